"""A weight packed on a card and on the host: the same codes and scales, but for values on an edge.

A value in the middle between two codes may go to either, because a card multiplies by 1 / scale
where the host divides. So codes are at most one step apart; how many are is in the test's record.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qlora_cli.nn.quant import BLOCK_SIZE_4BIT, BLOCK_SIZE_SCALES, QuantLinear, scale_codebook
from tests.helpers.quantized import draw, packed
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
Record = Callable[[str, object], None]
SHAPE = (1024, 1376)
"""Beyond one piece of packing, and whole blocks."""
ULPS = 4 * torch.finfo(torch.float32).eps
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def pair(weight: Tensor, card: torch.device, bits: int, **more: object) -> list[QuantLinear]:
    """(packed on the host, packed on the card and fetched)."""
    there = packed(weight.to(card), bits, **more)
    assert there.weight.device.type == card.type
    return [packed(weight, bits, **more), there.to(CPU)]


def nibbles(layer: QuantLinear) -> Tensor:
    codes = layer.weight.detach().flatten()
    return torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()


def ranks(quant_type: str) -> Tensor:
    """Where each code's value stands among all; codes of the same value stand together."""
    layer = packed(torch.ones(1, BLOCK_SIZE_4BIT), quant_type=quant_type, double_quant=False)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    layer.weight.data = (codes[0::2] << 4 | codes[1::2]).repeat(2)[:, None]
    values = layer.dequantize()[0, :16]
    return torch.unique(values, sorted=True, return_inverse=True)[1]


def note_share(record: Record, apart: Tensor) -> None:
    share = (apart != 0).double().mean().item()
    record("share_of_codes_that_differ", share)
    print(f"share of codes that differ: {share:.3g} of {apart.numel()}")


def test_ranks_are_in_the_order_of_values() -> None:
    assert torch.equal(ranks("nf4"), torch.arange(16))
    # FP4 has a zero of either sign.
    assert ranks("fp4").max() == 14


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_codes(
    card: torch.device,
    record_property: Record,
    quant_type: str,
    dtype: torch.dtype,
    double_quant: bool,
) -> None:
    host, there = pair(
        draw(*SHAPE, dtype=dtype), card, 4, quant_type=quant_type, double_quant=double_quant
    )
    rank = ranks(quant_type)
    apart = (rank[nibbles(host)] - rank[nibbles(there)]).abs()
    note_share(record_property, apart)
    assert apart.max() <= 1
    # Edges are rare: between any two codes there is one, and float32 is fine.
    assert (apart != 0).double().mean() < 1e-3


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_scales(card: torch.device, quant_type: str) -> None:
    """Largest magnitudes of a block: no arithmetic, so no difference."""
    host, there = pair(draw(*SHAPE), card, 4, quant_type=quant_type, double_quant=False)
    assert host.scale is not None
    assert there.scale is not None
    assert torch.equal(host.scale, there.scale)


def test_scales_that_are_quantized_themselves(card: torch.device, record_property: Record) -> None:
    """Their mean is a sum in another order; their codes are at most one step apart."""
    host, there = pair(draw(*SHAPE), card, 4)
    for one, other in (
        (host.offset_of_scale, there.offset_of_scale),
        (host.scale_of_scale, there.scale_of_scale),
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    assert host.scale is not None
    assert there.scale is not None
    apart = (host.scale.int() - there.scale.int()).abs()
    note_share(record_property, apart)
    assert apart.max() <= 1


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_values_are_within_one_code_step(
    card: torch.device, quant_type: str, double_quant: bool
) -> None:
    host, there = pair(draw(*SHAPE), card, 4, quant_type=quant_type, double_quant=double_quant)
    values = packed(draw(1, BLOCK_SIZE_4BIT), quant_type=quant_type, double_quant=False)
    steps = torch.unique(values.dequantize() / values.scale).diff()
    scale = packed(draw(*SHAPE), quant_type=quant_type, double_quant=False).scale
    assert scale is not None
    bound = scale.detach() * steps.max()
    if double_quant:
        # And one step of the scale's own code, times the largest value, which is 1.
        assert host.scale_of_scale is not None
        step = scale_codebook(CPU).diff().max()
        bound = (
            bound + step * host.scale_of_scale.repeat_interleave(BLOCK_SIZE_SCALES)[: bound.numel()]
        )
    apart = (host.dequantize() - there.dequantize()).abs().view(-1, BLOCK_SIZE_4BIT).amax(dim=1)
    assert (apart <= bound * (1 + ULPS)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_codes_and_scales(
    card: torch.device, record_property: Record, dtype: torch.dtype
) -> None:
    host, there = pair(draw(*SHAPE, dtype=dtype), card, 8)
    assert host.scale is not None
    torch.testing.assert_close(host.scale, there.scale, rtol=ULPS, atol=0)
    apart = (host.weight.int() - there.weight.int()).abs()
    note_share(record_property, apart)
    assert apart.max() <= 1
    assert (apart != 0).double().mean() < 1e-3
    steps = (host.dequantize() - there.dequantize()).abs() / host.scale[:, None]
    assert steps.max() <= 1 + 128 * ULPS


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_packed_is_read_alike_on_both(card: torch.device, bits: int) -> None:
    """The same codes and scales: on a card they stand for the same values as on the host."""
    layer = packed(draw(*SHAPE), bits)
    on_host = layer.dequantize()
    on_card = layer.to(card).dequantize().to(CPU)
    torch.testing.assert_close(on_card, on_host, rtol=ULPS, atol=0)
