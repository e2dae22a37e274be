"""A linear layer with a packed, frozen weight: 4 bit (NF4, FP4), 8 bit (LLM.int8()) or 16 bit.

This file uses the functional operations of bitsandbytes, which are exact, and not its modules. The
modules cannot be built on meta tensors. Their int8 product saves its input where activation
checkpointing cannot free it. On some CPUs a forward pass in eval mode repacks Linear4bit's weight
in place, and then LoRA's gradients silently become None. With functional operations, dequantization
and matrix product are separate operations that the memory tracker observes.

Packed weights are parameters, not buffers, because distributed engines shard parameters. No weight
is saved on an autograd context: the backward pass dequantizes it again.

The block sizes of 4-bit weights are BLOCK_SIZE_4BIT and BLOCK_SIZE_SCALES below. Nothing else in
the package depends on them. A run does not store them, so merge a run with the sizes of its
training.

Shapes: x (tokens, in), y (tokens, out), weight (out, in). Sources: Dettmers et al. 2022
(LLM.int8(), equations 3 to 8), 2023 (QLoRA, equations 4 to 6).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import attribute, scope

# On CPUs with AVX512-BF16 importing bitsandbytes warns that an optional package is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb_functional  # noqa: E402

BLOCK_SIZE_4BIT = 64
"""NF4 and FP4: number of consecutive weights that share one scale (QLoRA's default is 64)."""
BLOCK_SIZE_SCALES = 256
"""Double quantization: number of scales that share one scale of their own."""
OUTLIER_DIVISOR = 8
"""LLM.int8(): with more than in / 8 outlier columns, the complete product is computed in the
compute dtype. About 0.1 % of the columns are outliers; the limit bounds the memory of the outlier
part, so that it can be planned."""
PACK_ELEMENTS = 2**20
"""Number of weights that are packed at once, a multiple of every block size. On a CPU bitsandbytes
needs up to 28 temporary bytes per weight, which is 1.5 GiB for a gate projection of an 8B model."""
PIECES_ON_META = 2
"""Number of pieces that a dry run packs: every further piece needs the same memory."""

assert PACK_ELEMENTS % (BLOCK_SIZE_4BIT * BLOCK_SIZE_SCALES) == 0

_T = TypeVar("_T")
_TINY = torch.finfo(torch.float32).tiny
_ops = torch.ops.bitsandbytes


@dataclass(frozen=True)
class WeightFormat:
    """The storage format and the compute dtype of a base weight.

    bits: 4, 8 or 16. compute: dtype of activations and of the dequantized weight. storage: dtype of
    16-bit weights. quant_type: nf4 or fp4, for 4 bits. double_quant: quantize the scales, too, for
    4 bits. threshold: LLM.int8()'s outlier threshold for 8 bits, 0 for none.
    """

    bits: int
    compute: torch.dtype
    storage: torch.dtype
    quant_type: str = "nf4"
    double_quant: bool = True
    threshold: float = 6.0

    def plain(self) -> WeightFormat:
        """Return the 16-bit format with the same dtypes, for a weight that is not quantized."""
        return WeightFormat(16, self.compute, self.storage)


class QuantLinear(nn.Module):
    """y = x W^T + b with W packed and frozen.

    A new layer has a weight on meta; `pack` replaces it. category: the category of the memory
    ledger that counts the weight.
    """

    scale: nn.Parameter | None
    scale_of_scale: nn.Parameter | None
    offset_of_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weight_format: WeightFormat,
        category: str = "base",
    ) -> None:
        super().__init__()
        self.category = category
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format
        self.weight = _frozen(torch.empty(out_features, in_features, device="meta"))
        self.bias = None
        if bias:
            self.bias = _frozen(
                torch.empty(out_features, dtype=weight_format.compute, device="meta")
            )
        for constant in ("scale", "scale_of_scale", "offset_of_scale"):
            self.register_parameter(constant, None)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> None:
        """Quantize a weight (out, in) and store the result on the weight's device.

        The layer keeps no reference to the given tensor, except in the 16-bit format.
        """
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        with scope("temporary"):
            if self.weight_format.bits == 4:
                self._pack_4bit(weight)
            elif self.weight_format.bits == 8:
                self._pack_8bit(weight)
            else:
                self.weight = _frozen(weight.to(self.weight_format.storage).contiguous())
        attribute([self.weight], self.category)
        attribute(self.constants(), "quant_constants")

    def _pack_4bit(self, weight: Tensor) -> None:
        flat, device = weight.reshape(-1), weight.device
        packed = torch.empty(-(-flat.numel() // 2), 1, dtype=torch.uint8, device=device)
        scale = torch.empty(-(-flat.numel() // BLOCK_SIZE_4BIT), device=device)
        for start in _pieces(range(0, flat.numel(), PACK_ELEMENTS), flat):
            codes, scales = _ops.quantize_4bit(
                flat[start : start + PACK_ELEMENTS],
                BLOCK_SIZE_4BIT,
                self.weight_format.quant_type,
                torch.uint8,
            )
            packed[start // 2 :][: codes.shape[0]] = codes
            scale[start // BLOCK_SIZE_4BIT :][: scales.shape[0]] = scales
        self.weight = _frozen(packed)
        if not self.weight_format.double_quant:
            self.scale = _frozen(scale)
            return
        offset = scale.mean()
        codes, scale_of_scale = _ops.quantize_blockwise(
            scale - offset, scale_codebook(scale.device), BLOCK_SIZE_SCALES
        )
        self.scale = _frozen(codes)
        self.scale_of_scale = _frozen(scale_of_scale)
        self.offset_of_scale = _frozen(offset)

    def _pack_8bit(self, weight: Tensor) -> None:
        packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(self.out_features, device=weight.device)
        num_rows = max(1, PACK_ELEMENTS // self.in_features)
        pieces = zip(*(t.split(num_rows) for t in (weight, packed, scale)), strict=True)
        for rows, codes, row_scale in _pieces(list(pieces), weight):
            # The scale of an all-zero row is 0, and the row is divided by it.
            row_scale.copy_(rows.abs().amax(dim=1).float() / 127).clamp_min_(_TINY)
            codes.copy_(torch.div(rows, row_scale[:, None]).round_())
        self.weight, self.scale = _frozen(packed), _frozen(scale)

    def constants(self) -> Iterator[nn.Parameter]:
        """Yield the quantization constants of a packed weight: its scales."""
        for constant in (self.scale, self.scale_of_scale, self.offset_of_scale):
            if constant is not None:
                yield constant

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) that the layer computes with, in the compute dtype."""
        with scope("temporary"):
            if self.weight_format.bits == 16:
                return self.weight.to(self.weight_format.compute)
            if self.weight_format.bits == 8:
                return self._scaled(self.weight)
            assert self.scale is not None
            return _ops.dequantize_4bit(  # type: ignore[no-any-return]
                self.weight,
                self._block_scales(),
                BLOCK_SIZE_4BIT,
                self.weight_format.quant_type,
                [self.out_features, self.in_features],
                self.weight_format.compute,
            )

    def _block_scales(self) -> Tensor:
        assert self.scale is not None
        if self.scale_of_scale is None:
            return self.scale
        scale: Tensor = _ops.dequantize_blockwise(
            self.scale,
            self.scale_of_scale,
            scale_codebook(self.scale.device),
            BLOCK_SIZE_SCALES,
            torch.float32,
        )
        assert self.offset_of_scale is not None
        return scale.add_(self.offset_of_scale)

    def _scaled(self, columns: Tensor) -> Tensor:
        """Return int8 columns (out, n) in the compute dtype: scaled in float32, rounded once."""
        assert self.scale is not None
        out = torch.empty(columns.shape, dtype=self.weight_format.compute, device=columns.device)
        return torch.mul(columns, self.scale[:, None], out=out)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + b without recording a graph. x: (tokens, in)."""
        if self.weight_format.bits == 8:
            y = self._product_8bit(x)
            return y if self.bias is None else y.add_(self.bias)
        if self.bias is None:
            return x @ self.dequantize().t()
        return torch.addmm(self.bias, x, self.dequantize().t())

    def _product_8bit(self, x: Tensor) -> Tensor:
        with scope("temporary"):
            magnitudes = x.abs()
            columns = _outlier_columns(magnitudes, self.weight_format.threshold)
        if columns.numel() > self.in_features // OUTLIER_DIVISOR:
            del magnitudes
            return x @ self.dequantize().t()
        with scope("temporary"):
            # Outliers are set to zero in tensors that are computed from x, not in a copy of x.
            row_scale = magnitudes.index_fill_(1, columns, 0).amax(dim=1, keepdim=True).float()
            del magnitudes
            row_scale = row_scale.clamp_min_(_TINY).div_(127)
            codes = torch.div(x, row_scale).index_fill_(1, columns, 0).round_().to(torch.int8)
            counts = _ops.int8_linear_matmul(codes, self.weight)
            del codes
            assert self.scale is not None
            scaled = torch.mul(counts, row_scale).mul_(self.scale)
            del counts
        y = scaled.to(x.dtype)
        if columns.numel():
            y.addmm_(x.index_select(1, columns), self._scaled(self.weight[:, columns]).t())
        return y

    def grad_input(self, grad: Tensor) -> Tensor:
        """Return the gradient of the input (tokens, in). grad: (tokens, out), of the output."""
        return grad @ self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out); differentiable in x only."""
        y: Tensor = _FrozenProduct.apply(x.reshape(-1, self.in_features), self)
        return y.view(*x.shape[:-1], self.out_features)


class _FrozenProduct(torch.autograd.Function):
    """A product whose weight needs no gradient. It saves nothing for the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return layer.product(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.grad_input(grad), None  # type: ignore[attr-defined]


_codebooks: dict[torch.device, Tensor] = {}


def clear_scale_codebook(device: torch.device) -> None:
    """Remove the codebook of `device`, so that its memory is counted again, as in a new process."""
    _codebooks.pop(device, None)


def scale_codebook(device: torch.device) -> Tensor:
    """Return the 256 values of the 8-bit codes of quantized scales, one tensor per device.

    The cache is here and not in bitsandbytes, whose cache a dry run would fill with meta tensors.
    """
    if device not in _codebooks:
        with scope("quant_constants"):
            _codebooks[device] = bnb_functional.create_dynamic_map().to(device)
    return _codebooks[device]


def _outlier_columns(magnitudes: Tensor, threshold: float) -> Tensor:
    """Return the indices of the columns of |x| with a value above the threshold.

    On meta tensors: as many columns as the mixed product allows at most, an upper bound.
    """
    if threshold == 0:
        return torch.empty(0, dtype=torch.long, device=magnitudes.device)
    is_outlier = (magnitudes > threshold).any(dim=0)
    if magnitudes.is_meta:
        return torch.empty(is_outlier.shape[0] // OUTLIER_DIVISOR, dtype=torch.long, device="meta")
    return is_outlier.nonzero().flatten()


def _pieces(pieces: Sequence[_T], weight: Tensor) -> Sequence[_T]:
    """Return all pieces, or the first PIECES_ON_META of a weight on meta."""
    return pieces[:PIECES_ON_META] if weight.is_meta else pieces


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
