"""The search of scales: never worse than bitsandbytes' scales, and every code is the nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.nn import scale_search
from qlora_cli.nn.packing import BLOCK_SIZE_4BIT, WeightFormat
from qlora_cli.nn.quant import QuantLinear

FORMATS = [(quant_type, double) for quant_type in ("nf4", "fp4") for double in (False, True)]


def packed(weight: Tensor, scales: str, importance: Tensor | None = None, **own: Any) -> Tensor:
    """Return the dequantized weight."""
    settings = {"scales": scales, "importance": importance, **own}
    weight_format = WeightFormat(4, torch.float32, torch.float16, **settings)
    layer = QuantLinear(weight.shape[1], weight.shape[0], False, weight_format)
    layer.pack(weight)
    return layer.dequantize()


def random_weight(rows: int = 24, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def random_importance(columns: int = 96) -> Tensor:
    """Return mean squares that differ by orders of magnitude, as those of language models do."""
    return torch.randn(columns, generator=torch.Generator().manual_seed(2)).mul_(3).exp_()


def block_errors(weight: Tensor, stored: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return the squared error of each block of 64 weights, which are weighted by column."""
    errors = (weight - stored).square()
    if importance is not None:
        errors = errors * importance
    return errors.view(-1, BLOCK_SIZE_4BIT).sum(dim=1)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_no_block_is_worse_than_with_the_largest_value_as_scale(quant_type: str) -> None:
    weight = random_weight()
    plain, searched = (
        block_errors(weight, packed(weight, scales, quant_type=quant_type, double_quant=False))
        for scales in ("absmax", "search")
    )
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_the_weighted_error_is_lowest_with_measured_inputs(
    quant_type: str, double_quant: bool
) -> None:
    weight, importance = random_weight(), random_importance()
    own: dict[str, Any] = {"quant_type": quant_type, "double_quant": double_quant}
    absmax, search, measured = (
        float(block_errors(weight, packed(weight, scales, given, **own), importance).sum())
        for scales, given in (("absmax", None), ("search", None), ("measured", importance))
    )
    assert measured < 0.9 * min(absmax, search)


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_every_code_is_the_nearest_one_for_the_stored_scale(
    quant_type: str, double_quant: bool
) -> None:
    weight = random_weight()
    stored = packed(weight, "search", quant_type=quant_type, double_quant=double_quant)
    levels = scale_search._Levels(quant_type, torch.device("cpu")).values
    for block, values in zip(
        weight.view(-1, BLOCK_SIZE_4BIT), stored.view(-1, BLOCK_SIZE_4BIT), strict=True
    ):
        # The largest stored value is a level times the scale; every such scale is tried.
        candidates = [values.abs().max() / level.abs() for level in levels if level.abs() > 0.3]
        grids = [levels * scale for scale in candidates]
        errors = [(block[:, None] - grid).abs().min(dim=1).values for grid in grids]
        found = (block - values).abs()
        assert any(torch.allclose(found, error, atol=1e-6) for error in errors)


def test_pieces_have_no_effect_and_the_last_block_may_be_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, importance = random_weight(7, 75), random_importance(75)
    whole = packed(weight, "measured", importance)
    monkeypatch.setattr(scale_search, "PACK_ELEMENTS", 2 * BLOCK_SIZE_4BIT)
    assert torch.equal(packed(weight, "measured", importance), whole)
    plain = packed(weight, "absmax")
    last, last_plain = (
        ((stored - weight).square() * importance).flatten()[-(7 * 75 % BLOCK_SIZE_4BIT) :].sum()
        for stored in (whole, plain)
    )
    assert 0 < last < last_plain


def test_columns_have_their_own_weights() -> None:
    # Only the first column counts, so its values are stored almost exactly.
    weight = random_weight(8, 64)
    importance = torch.zeros(64)
    importance[0] = 1.0
    plain = (packed(weight, "absmax") - weight)[:, 0].square().sum()
    assert (packed(weight, "measured", importance) - weight)[:, 0].square().sum() < 0.2 * plain


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 64)
    assert torch.equal(packed(weight, "search", double_quant=False), weight)


def test_a_linear_without_a_measurement_is_not_packed_in_silence() -> None:
    with pytest.raises(AssertionError, match="not measured"):
        packed(random_weight(), "measured", None)
