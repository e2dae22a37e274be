"""A weight quantized on the GPU and on the CPU has the same codes and scales, except for ties.

A value halfway between two codes may get either code, because the GPU multiplies by 1 / scale and
the CPU divides by scale. Codes therefore differ by at most one step. The test records how many do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qlora_cli.nn.codebook import scale_codebook
from qlora_cli.nn.packing import BLOCK_SIZE_4BIT, BLOCK_SIZE_SCALES
from qlora_cli.nn.quant import QuantLinear
from tests.helpers.quantized import draw, packed
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
Record = Callable[[str, object], None]
SHAPE = (1024, 1376)
"""(out, in): more than one piece of packing, and a multiple of the block size."""
ULPS = 4 * torch.finfo(torch.float32).eps
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def pair(weight: Tensor, gpu: torch.device, bits: int, **more: object) -> list[QuantLinear]:
    """Return (layer quantized on the CPU, layer quantized on the GPU and copied to the CPU)."""
    on_gpu = packed(weight.to(gpu), bits, **more)
    assert on_gpu.weight.device.type == gpu.type
    return [packed(weight, bits, **more), on_gpu.to(CPU)]


def nibbles(layer: QuantLinear) -> Tensor:
    codes = layer.weight.detach().flatten()
    return torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()


def ranks(quant_type: str) -> Tensor:
    """Return the rank of each code's value, from smallest to largest; equal values are equal."""
    layer = packed(torch.ones(1, BLOCK_SIZE_4BIT), quant_type=quant_type, double_quant=False)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    layer.weight.data = (codes[0::2] << 4 | codes[1::2]).repeat(2)[:, None]
    values = layer.dequantize()[0, :16]
    return torch.unique(values, sorted=True, return_inverse=True)[1]


def note_share(record: Record, difference: Tensor) -> None:
    share = (difference != 0).double().mean().item()
    record("share_of_codes_that_differ", share)
    print(f"share of codes that differ: {share:.3g} of {difference.numel()}")


def test_ranks_are_in_the_order_of_values() -> None:
    assert torch.equal(ranks("nf4"), torch.arange(16))
    # FP4 has a zero of either sign.
    assert ranks("fp4").max() == 14


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_codes(
    gpu: torch.device,
    record_property: Record,
    quant_type: str,
    dtype: torch.dtype,
    double_quant: bool,
) -> None:
    on_cpu, on_gpu = pair(
        draw(*SHAPE, dtype=dtype), gpu, 4, quant_type=quant_type, double_quant=double_quant
    )
    rank = ranks(quant_type)
    difference = (rank[nibbles(on_cpu)] - rank[nibbles(on_gpu)]).abs()
    note_share(record_property, difference)
    assert difference.max() <= 1
    # Ties are rare: there is one value halfway between two codes, and float32 is precise.
    assert (difference != 0).double().mean() < 1e-3


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_scales(gpu: torch.device, quant_type: str) -> None:
    """A scale is the largest magnitude of a block. No arithmetic, so no difference."""
    on_cpu, on_gpu = pair(draw(*SHAPE), gpu, 4, quant_type=quant_type, double_quant=False)
    assert on_cpu.scale is not None
    assert on_gpu.scale is not None
    assert torch.equal(on_cpu.scale, on_gpu.scale)


def test_quantized_scales(gpu: torch.device, record_property: Record) -> None:
    """The mean of the scales is summed in another order; codes differ by at most one step."""
    on_cpu, on_gpu = pair(draw(*SHAPE), gpu, 4)
    for name in ("offset_of_scale", "scale_of_scale"):
        expected, found = getattr(on_cpu, name), getattr(on_gpu, name)
        torch.testing.assert_close(expected, found, rtol=1e-5, atol=0)
    assert on_cpu.scale is not None
    assert on_gpu.scale is not None
    difference = (on_cpu.scale.int() - on_gpu.scale.int()).abs()
    note_share(record_property, difference)
    assert difference.max() <= 1


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_values_are_within_one_code_step(
    gpu: torch.device, quant_type: str, double_quant: bool
) -> None:
    on_cpu, on_gpu = pair(draw(*SHAPE), gpu, 4, quant_type=quant_type, double_quant=double_quant)
    values = packed(draw(1, BLOCK_SIZE_4BIT), quant_type=quant_type, double_quant=False)
    steps = torch.unique(values.dequantize() / values.scale).diff()
    scale = packed(draw(*SHAPE), quant_type=quant_type, double_quant=False).scale
    assert scale is not None
    bound = scale.detach() * steps.max()
    if double_quant:
        # Plus one step of the quantized scale, times the largest value of a code, which is 1.
        assert on_cpu.scale_of_scale is not None
        step = scale_codebook(CPU).diff().max()
        bound = (
            bound
            + step * on_cpu.scale_of_scale.repeat_interleave(BLOCK_SIZE_SCALES)[: bound.numel()]
        )
    difference = (
        (on_cpu.dequantize() - on_gpu.dequantize()).abs().view(-1, BLOCK_SIZE_4BIT).amax(dim=1)
    )
    assert (difference <= bound * (1 + ULPS)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_codes_and_scales(
    gpu: torch.device, record_property: Record, dtype: torch.dtype
) -> None:
    on_cpu, on_gpu = pair(draw(*SHAPE, dtype=dtype), gpu, 8)
    assert on_cpu.scale is not None
    torch.testing.assert_close(on_cpu.scale, on_gpu.scale, rtol=ULPS, atol=0)
    difference = (on_cpu.weight.int() - on_gpu.weight.int()).abs()
    note_share(record_property, difference)
    assert difference.max() <= 1
    assert (difference != 0).double().mean() < 1e-3
    steps = (on_cpu.dequantize() - on_gpu.dequantize()).abs() / on_cpu.scale[:, None]
    assert steps.max() <= 1 + 128 * ULPS


@pytest.mark.parametrize("bits", [4, 8])
def test_both_devices_dequantize_to_the_same_values(gpu: torch.device, bits: int) -> None:
    """The same codes and scales give the same values on the GPU and on the CPU."""
    layer = packed(draw(*SHAPE), bits)
    on_cpu = layer.dequantize()
    on_gpu = layer.to(gpu).dequantize().to(CPU)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=ULPS, atol=0)
