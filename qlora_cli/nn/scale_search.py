"""Packs a weight in 4 bit with the scales that lose least.

bitsandbytes scales a block by its largest absolute value, so that this value is exact. A smaller
scale clips it and rounds the other values more finely. Here several scales are tried for each
block, and that with the lowest squared error is taken. The squared errors can be weighted by the
mean squares of the linear's inputs: then the error of the linear's output is lowest, if inputs are
uncorrelated, which matters because some inputs are much larger than others (Lin et al. 2023, AWQ).

The result has the format of `packed_4bit` and needs the same memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.nn.int8_product import TINY
from qlora_cli.nn.packing import (
    BLOCK_SIZE_4BIT,
    PACK_ELEMENTS,
    dequantized_4bit,
    dequantized_scales,
    packed_scales,
    pieces,
)

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 1.05)
"""Scales that are tried, as shares of a block's largest absolute value."""


def searched_4bit(
    weight: Tensor, quant_type: str, double_quant: bool, importance: Tensor | None
) -> list[Tensor]:
    """Return the tensors of `packed_4bit`, with the scales of the lowest squared error.

    weight: (out, in). importance: (in,), the weight of the squared error of each column; None for
    equal weights. The other arguments are those of `packed_4bit`.
    """
    levels = _Levels(quant_type, weight.device)
    flat = weight.reshape(-1)
    starts = pieces(range(0, flat.numel(), PACK_ELEMENTS), flat)
    scale = torch.empty(-(-flat.numel() // BLOCK_SIZE_4BIT), device=weight.device)
    for start in starts:
        blocks = _blocks(flat[start : start + PACK_ELEMENTS].float())
        weights = None
        if importance is not None:
            numbers = torch.arange(start, start + blocks.numel(), device=weight.device)
            numbers = numbers.remainder_(len(importance))
            weights = importance.index_select(0, numbers).view_as(blocks)
            del numbers
        found = _best_scales(blocks, weights, levels)
        scale[start // BLOCK_SIZE_4BIT :][: len(found)] = found
        del blocks, weights, found
    tensors = packed_scales(scale, double_quant)
    # The codes are the nearest ones for the scales as they are stored.
    stored = dequantized_scales(*tensors) if double_quant else scale
    packed = torch.empty(-(-flat.numel() // 2), 1, dtype=torch.uint8, device=weight.device)
    for start in starts:
        blocks = _blocks(flat[start : start + PACK_ELEMENTS].float())
        own = stored[start // BLOCK_SIZE_4BIT :][: len(blocks)]
        codes = levels.codes(blocks, own[:, None])
        part = packed[start // 2 :][: len(codes)]
        part.copy_(codes[: len(part)])
        del blocks, own, codes, part
    return [packed, *tensors]


def _blocks(flat: Tensor) -> Tensor:
    """Return values as blocks (n, BLOCK_SIZE_4BIT); zeros complete the last one."""
    missing = -flat.numel() % BLOCK_SIZE_4BIT
    padded = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
    return padded.view(-1, BLOCK_SIZE_4BIT)


class _Levels:
    """The 16 values of a 4-bit type in ascending order, and the code of each.

    They are what the codes are dequantized to, with a scale of 1.
    """

    def __init__(self, quant_type: str, device: torch.device) -> None:
        # Two codes in each byte, the first one in the high bits.
        every_code = torch.arange(0x01, 0x100, 0x22, device=device).to(torch.uint8)[:, None]
        one = torch.ones(1, device=device)
        values = dequantized_4bit(every_code, one, range(16), quant_type, torch.float32)
        self.values, order = values.flatten().sort(stable=True)
        self._code_of_level = order.to(torch.uint8)
        self._middles = (self.values[1:] + self.values[:-1]) / 2

    def nearest(self, blocks: Tensor, scale: Tensor) -> Tensor:
        """Return the level that is nearest to each value of `blocks / scale`. scale: (n, 1)."""
        return self._of_nearest(self.values, blocks, scale)

    def codes(self, blocks: Tensor, scale: Tensor) -> Tensor:
        """Return the codes of the levels of `nearest`, uint8 (m, 1) with two codes in each."""
        codes = self._of_nearest(self._code_of_level, blocks, scale).view(-1, 2)
        return (codes[:, :1] << 4) | codes[:, 1:]

    def _of_nearest(self, table: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
        numbers = torch.bucketize(blocks / scale, self._middles, out_int32=True)
        # Indexing with brackets would copy the numbers to int64, which no memory plan sees.
        return table.index_select(0, numbers.flatten()).view_as(blocks)


def _best_scales(blocks: Tensor, weights: Tensor | None, levels: _Levels) -> Tensor:
    """Return the scale of each block (n,) with the lowest squared error.

    blocks: (n, BLOCK_SIZE_4BIT). weights: of the squared errors, of the shape of `blocks`; None for
    equal ones.
    """
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp_min_(TINY)
    best = largest.clone()
    least = torch.full_like(largest, torch.inf)
    for factor in FACTORS:
        scale = largest * factor
        error = levels.nearest(blocks, scale).mul_(scale).sub_(blocks).square_()
        if weights is not None:
            error.mul_(weights)
        total = error.sum(dim=1, keepdim=True)
        is_better = total < least
        best = torch.where(is_better, scale, best)
        least = torch.where(is_better, total, least)
    return best[:, 0]
