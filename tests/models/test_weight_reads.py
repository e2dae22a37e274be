"""Linears whose weights the code of their parent reads are found, unless a setting excludes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_cli.models.build import skeleton
from qlora_cli.proof.small_config import small_config


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("mamba2", {}, ("mixer.out_proj",)),
        ("mamba", {}, ("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")),
        ("bloom", {}, ()),
        (
            "bloom",
            {"pretraining_tp": 2, "slow_but_exact": True},
            ("self_attention.dense", "mlp.dense_4h_to_h"),
        ),
        ("olmo2", {}, ()),
    ],
)
def test_weights_that_are_read_stay_in_16_bit(
    model_type: str, settings: dict[str, Any], expected: tuple[str, ...]
) -> None:
    config = small_config(AutoConfig.for_model(model_type, **settings))
    _, family = skeleton(config, torch.float32)
    assert family.unquantized == expected
    assert not {spec.path for spec in family.linears} & set(expected)
