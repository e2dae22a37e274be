"""Quantizes and dequantizes weights: NF4 and FP4 in blocks, and int8 with one scale per row.

The block sizes of 4-bit weights are BLOCK_SIZE_4BIT and BLOCK_SIZE_SCALES below. Nothing else in
the package depends on them. A run does not store them, so merge a run with the sizes of its
training.

Shapes: weight (out, in). Sources: Dettmers et al. 2022 (LLM.int8(), equation 3), 2023 (QLoRA,
equations 4 to 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from qlora_cli.nn.codebook import scale_codebook
from qlora_cli.nn.int8_product import TINY

BLOCK_SIZE_4BIT = 64
"""NF4 and FP4: number of consecutive weights that share one scale (QLoRA's default is 64)."""
BLOCK_SIZE_SCALES = 256
"""Double quantization: number of scales that share one scale of their own."""
PACK_ELEMENTS = 2**20
"""Number of weights that are packed at once, a multiple of every block size. On a CPU bitsandbytes
needs up to 28 temporary bytes per weight, which is 1.5 GiB for a gate projection of an 8B model."""
PIECES_ON_META = 2
"""Number of pieces that a dry run packs: every further piece needs the same memory."""

assert PACK_ELEMENTS % (BLOCK_SIZE_4BIT * BLOCK_SIZE_SCALES) == 0

_T = TypeVar("_T")
_ops = torch.ops.bitsandbytes


@dataclass(frozen=True)
class WeightFormat:
    """The storage format and the compute dtype of a base weight.

    bits: 4, 8 or 16. compute: dtype of activations and of the dequantized weight. storage: dtype of
    16-bit weights. quant_type: nf4 or fp4, for 4 bits. double_quant: quantize the scales, too, for
    4 bits. threshold: LLM.int8()'s outlier threshold for 8 bits, 0 for none. scales: how those of
    4 bits are chosen (`base.scales`). importance: (in,), mean squares of the linear's inputs for
    scales `measured`; None in a plan, and for a linear that was not measured.
    """

    bits: int
    compute: torch.dtype
    storage: torch.dtype
    quant_type: str = "nf4"
    double_quant: bool = True
    threshold: float = 6.0
    scales: str = "absmax"
    importance: Tensor | None = field(default=None, compare=False, repr=False)

    def plain(self) -> WeightFormat:
        """Return the 16-bit format with the same dtypes, for a weight that is not quantized."""
        return WeightFormat(16, self.compute, self.storage)


def packed_4bit(weight: Tensor, quant_type: str, double_quant: bool) -> list[Tensor]:
    """Return the codes of a weight, and the scales of its blocks of BLOCK_SIZE_4BIT weights.

    quant_type: nf4 or fp4. double_quant: return codes of the scales, their scales and their offset
    in place of the scales.
    """
    flat, device = weight.reshape(-1), weight.device
    packed = torch.empty(-(-flat.numel() // 2), 1, dtype=torch.uint8, device=device)
    scale = torch.empty(-(-flat.numel() // BLOCK_SIZE_4BIT), device=device)
    for start in pieces(range(0, flat.numel(), PACK_ELEMENTS), flat):
        codes, scales = _ops.quantize_4bit(
            flat[start : start + PACK_ELEMENTS], BLOCK_SIZE_4BIT, quant_type, torch.uint8
        )
        packed[start // 2 :][: codes.shape[0]] = codes
        scale[start // BLOCK_SIZE_4BIT :][: scales.shape[0]] = scales
    return [packed, *packed_scales(scale, double_quant)]


def packed_scales(scale: Tensor, double_quant: bool) -> list[Tensor]:
    """Return the scales of blocks as they are stored: as they are, or codes, scales and offset."""
    if not double_quant:
        return [scale]
    offset = scale.mean()
    codes, scale_of_scale = _ops.quantize_blockwise(
        scale - offset, scale_codebook(scale.device), BLOCK_SIZE_SCALES
    )
    return [codes, scale_of_scale, offset]


def dequantized_scales(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return the scales of blocks in float32 that double quantization has packed."""
    scales: Tensor = _ops.dequantize_blockwise(
        codes, scale, scale_codebook(codes.device), BLOCK_SIZE_SCALES, torch.float32
    )
    return scales.add_(offset)


def dequantized_4bit(
    packed: Tensor, scale: Tensor, values: range, quant_type: str, dtype: torch.dtype
) -> Tensor:
    """Return consecutive values of a packed weight, flat, in `dtype`.

    scale: of every block, float32. values: begins with a block, and ends with one or with the
    weight.
    """
    # Flat: for a matrix, bitsandbytes' CPU kernel lets no block cross the end of a row.
    flat: Tensor = _ops.dequantize_4bit(
        packed[values.start // 2 : -(-values.stop // 2)],
        scale[values.start // BLOCK_SIZE_4BIT : -(-values.stop // BLOCK_SIZE_4BIT)],
        BLOCK_SIZE_4BIT,
        quant_type,
        [len(values)],
        dtype,
    )
    return flat


def packed_8bit(weight: Tensor) -> list[Tensor]:
    """Return codes (out, in) int8 and the scale of each row (out,) float32."""
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], device=weight.device)
    num_rows = max(1, PACK_ELEMENTS // weight.shape[1])
    parts = zip(*(t.split(num_rows) for t in (weight, packed, scale)), strict=True)
    for rows, codes, row_scale in pieces(list(parts), weight):
        # The scale of an all-zero row is 0, and the row is divided by it.
        row_scale.copy_(rows.abs().amax(dim=1).float() / 127).clamp_min_(TINY)
        codes.copy_(torch.div(rows, row_scale[:, None]).round_())
    return [packed, scale]


def pieces(parts: Sequence[_T], weight: Tensor) -> Sequence[_T]:
    """Return all parts, or the first PIECES_ON_META of a weight on meta."""
    return parts[:PIECES_ON_META] if weight.is_meta else parts
