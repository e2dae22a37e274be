"""What a derived family cannot do is a note of the plan and of the run."""

from __future__ import annotations

import re

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.files.composed import language_config
from qlora_cli.models.limits import limits_of
from qlora_cli.proof.small_config import small_config


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", []),
        ("olmo2", []),
        ("llava", [r"model\.vision_tower, model\.multi_modal_projector are not loaded"]),
        ("bloom", ["one at a time in self_attention of each block"]),
        ("cpmant", ["runs one row at a time, because it adds tokens"]),
        (
            "llama4_text",
            [
                "feed_forward.router",
                r"294,912 parameters \(feed_forward.experts.gate_up_proj, .* stay in 16 bit",
            ],
        ),
        ("mixtral", ["147,456 parameters of experts are packed like the linears"]),
        (
            "mamba2",
            ["one at a time in mixer of each block", r"16,384 parameters \(mixer.out_proj of each"],
        ),
    ],
)
def test_the_notes_name_each_limit(model_type: str, expected: list[str]) -> None:
    """Two blocks with 4 experts of 3 x 64 x 96 values each, and with 64 x 128 in `out_proj`.

    Llama 4 keeps four blocks, because every fourth one has no rotary positions.
    """
    config = language_config(AutoConfig.for_model(model_type))
    found = limits_of(small_config(config), AutoModelForCausalLM)
    assert len(found) == len(expected)
    for note, text in zip(found, expected, strict=True):
        assert re.search(text, note)
