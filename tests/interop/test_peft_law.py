"""PEFT reads the adapter of a derived family and computes the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from peft_law import LIMIT, peft_logits
from transformers import AutoConfig

from qlora_cli.adapters import peft_config
from qlora_cli.files.composed import language_config
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.proof.small_model import SmallModel, small_model
from qlora_cli.tasks.causal import CAUSAL

# PEFT 0.21 uses an attribute that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TYPES = [
    "phi3",
    "gemma2",
    "gpt_neox",
    "bloom",
    "qwen3_5_text",
    "mamba2",
    "gpt_oss",
    "deepseek_v3",
    "llava",
]
"""Fused projections, soft caps, renamed tensors, own attention, linear attention, state space,
transposed experts, linears with the names of former experts, vision and text."""


@pytest.fixture(scope="module")
def small() -> Iterator[SmallModel]:
    with small_model(AutoConfig.for_model("phi3"), CAUSAL) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_peft_computes_the_same_logits(model_type: str) -> None:
    config = language_config(AutoConfig.for_model(model_type))
    with small_model(config, CAUSAL) as found:
        assert peft_logits(found) < LIMIT


def test_a_wrong_scaling_in_the_file_is_detected(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert peft_logits(small) < LIMIT

    def save_with_fault(*arguments: object) -> None:
        save_adapter(*arguments)  # type: ignore[arg-type]
        file = small.folder / "peft" / peft_config.CONFIG
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"lora_alpha": 2 * content["lora_alpha"]}))

    monkeypatch.setattr("peft_law.save_adapter", save_with_fault)
    assert peft_logits(small) > 1e-3
