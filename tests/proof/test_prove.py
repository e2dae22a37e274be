"""The proof of a model type: what passes, what is refused with which law, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_cli.errors import ModelError
from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.nn import attention
from qlora_cli.proof import laws, prove
from qlora_cli.proof.small_config import small_config
from qlora_cli.proof.small_model import SmallModel, small_model
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.observers import NoteRecorder

PROVED = (
    "phi3",
    "olmo2",
    "starcoder2",
    "smollm3",
    "glm4",
    "ernie4_5",
    "ministral3",
    "seed_oss",
    "cwm",
)
"""Fused projections, norms after the blocks' parts, an MLP without a gate, layers without rotary
positions, partial rotary positions, biases, and sliding windows."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has an empty cache."""
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small() -> Iterator[SmallModel]:
    """A small model of a type with grouped heads and a sliding window in one of two layers."""
    with small_model(AutoConfig.for_model("cwm"), CAUSAL) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROVED)
def test_a_model_type_obeys_every_law(model_type: str) -> None:
    proof = prove.proof_of(AutoConfig.for_model(model_type), CAUSAL, Silent())
    assert proof.failed is None, proof.failed
    assert [result.law for result in proof.results] == [law.name for law in prove.LAWS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "law"),
    [("bloom", "logits"), ("stablelm", "packing"), ("opt", "logits"), ("granite_swa", "logits")],
)
def test_an_unsupported_type_is_refused_with_the_law(model_type: str, law: str) -> None:
    config = AutoConfig.for_model(model_type)
    proof = prove.proof_of(config, CAUSAL, Silent())
    assert proof.failed is not None
    assert proof.failed.law == law
    with pytest.raises(ModelError, match=f"'{model_type}' is not supported: on a small model"):
        prove.require_proof(config, CAUSAL, Silent())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "is not a linear"),
        ("phi", "its head has a bias"),
        ("gemma3_text", "computes a buffer"),
        ("jamba", "blocks 0 and 1 differ"),
        ("hrm_text", "one list of blocks is needed"),
        ("gemma2", "final_logit_softcapping"),
    ],
)
def test_what_a_family_cannot_describe_is_refused_with_the_reason(
    model_type: str, reason: str
) -> None:
    config = small_config(AutoConfig.for_model(model_type))
    proof = prove.proof_of(config, CAUSAL, Silent())
    assert proof.failed is not None
    assert reason in (proof.failed.error or "")


def test_a_proof_is_kept_and_read_back() -> None:
    config = AutoConfig.for_model("olmo2")
    first, second = NoteRecorder(), NoteRecorder()
    proof = prove.proof_of(config, CAUSAL, first)
    assert prove.proof_of(config, CAUSAL, second) == proof
    assert "first use" in first.notes[0]
    assert not second.notes
    assert prove.stored_proofs() == [proof]
    (entry,) = cache.entries()
    assert (entry.kind, entry.description) == (cache.PROOFS, "olmo2")


def test_a_proof_does_not_change_the_random_numbers_of_the_job() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prove.proof_of(AutoConfig.for_model("olmo2"), CAUSAL, Silent())
    assert torch.equal(torch.rand(3), expected)


def test_hand_written_families_are_not_proved_at_run_time() -> None:
    assert prove.require_proof(AutoConfig.for_model("llama"), CAUSAL, Silent()) is None


def _attend_with(**changes: Any) -> Any:
    original = attention.attend

    def attend(*args: Any, **settings: Any) -> Any:
        return original(*args, **{**settings, **changes})

    return attend


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"sliding_window": None}, "logits"),
        ({"scaling": 0.5}, "logits"),
        ({"spans": None}, "packing"),
    ],
)
def test_a_wrong_attention_is_detected(
    small: SmallModel, changes: dict[str, Any], law: str
) -> None:
    attention.AttentionInterface.register(attention.NAME, _attend_with(**changes))
    try:
        assert getattr(laws, law)(small) > 1e-3
    finally:
        attention.AttentionInterface.register(attention.NAME, attention.attend)
    assert getattr(laws, law)(small) < 1e-5


def test_a_wrong_scaling_of_the_adapter_is_detected(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert laws.gradients(small) < 1e-5
    monkeypatch.setattr(
        "qlora_cli.adapters.lora.LoraLinear.delta",
        lambda layer: torch.zeros(layer.base.out_features, layer.base.in_features),
    )
    assert laws.gradients(small) > 1e-3
