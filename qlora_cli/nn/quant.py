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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import attribute, scope
from qlora_cli.nn.codebook import scale_codebook
from qlora_cli.nn.int8_product import TINY, int8_product, scaled_codes

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
    ledger that counts the weight. For generation, `keep_dequantized` and `fuse_token_product` make
    the product of one token faster; training uses neither.
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
        self._dequantized: Tensor | None = None
        self._fuses_token_product = False

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
        self.renew_dequantized()

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
            row_scale.copy_(rows.abs().amax(dim=1).float() / 127).clamp_min_(TINY)
            codes.copy_(torch.div(rows, row_scale[:, None]).round_())
        self.weight, self.scale = _frozen(packed), _frozen(scale)

    def constants(self) -> Iterator[nn.Parameter]:
        """Yield the quantization constants of a packed weight: its scales."""
        for constant in (self.scale, self.scale_of_scale, self.offset_of_scale):
            if constant is not None:
                yield constant

    @property
    def dequantized_bytes(self) -> int:
        """Return the bytes that `keep_dequantized` needs; 0 if it would change nothing.

        LLM.int8() multiplies codes, and a 16-bit weight may be in the compute dtype already.
        """
        compute = self.weight_format.compute
        if self.weight_format.bits == 8 or self.weight.dtype == compute:
            return 0
        return self.out_features * self.in_features * compute.itemsize

    @torch.no_grad()
    def keep_dequantized(self) -> None:
        """Dequantize the weight once instead of in every product, which gives the same bits.

        It needs `dequantized_bytes` in addition to the packed weight. `pack` renews the copy.
        """
        self._dequantized = None
        self._dequantized = self.dequantize()

    def renew_dequantized(self) -> None:
        """Dequantize a new weight if `keep_dequantized` was called."""
        if self._dequantized is not None:
            self.keep_dequantized()

    def fuse_token_product(self) -> None:
        """Multiply single tokens by the packed 4-bit weight in one kernel of bitsandbytes.

        The kernel adds in another order than `x @ dequantize().t()`, so results differ by rounding.
        It has no effect on rows that are no multiple of a block, for which there is no kernel.
        """
        is_4bit = self.weight_format.bits == 4
        self._fuses_token_product = is_4bit and self.in_features % BLOCK_SIZE_4BIT == 0

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) that the layer computes with, in the compute dtype."""
        if self._dequantized is not None:
            return self._dequantized
        with scope("temporary"):
            if self.weight_format.bits == 16:
                return self.weight.to(self.weight_format.compute)
            if self.weight_format.bits == 8:
                assert self.scale is not None
                return scaled_codes(self.weight, self.scale, self.weight_format.compute)
            assert self.scale is not None
            # Flat: for a matrix, bitsandbytes' CPU kernel lets no block cross the end of a row.
            flat: Tensor = _ops.dequantize_4bit(
                self.weight,
                self._block_scales(),
                BLOCK_SIZE_4BIT,
                self.weight_format.quant_type,
                [self.out_features * self.in_features],
                self.weight_format.compute,
            )
            return flat.view(self.out_features, self.in_features)

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

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + b without recording a graph. x: (tokens, in)."""
        if self.weight_format.bits == 8:
            y = self._product_8bit(x)
            return y if self.bias is None else y.add_(self.bias)
        if self._fuses_token_product and x.shape[0] == 1:
            return self._fused_product(x)
        if self.bias is None:
            return x @ self.dequantize().t()
        return torch.addmm(self.bias, x, self.dequantize().t())

    def _product_8bit(self, x: Tensor) -> Tensor:
        assert self.scale is not None
        y = int8_product(x, self.weight, self.scale, self.weight_format.threshold)
        return x @ self.dequantize().t() if y is None else y

    def _fused_product(self, x: Tensor) -> Tensor:
        is_nested = self.scale_of_scale is not None
        return _ops.gemm_4bit(  # type: ignore[no-any-return]
            x,
            self.weight,
            [self.out_features, self.in_features],
            self.scale_of_scale if is_nested else self.scale,
            BLOCK_SIZE_4BIT,
            self.weight_format.quant_type,
            bias=self.bias,
            absmax_8bit=self.scale if is_nested else None,
            absmax_code=scale_codebook(x.device) if is_nested else None,
            absmax_offset=self.offset_of_scale,
        )

    def grad_input(self, grad: Tensor) -> Tensor:
        """Return the gradient of the input (tokens, in). grad: (tokens, out), of the output."""
        return grad @ self.dequantize()

    def add_grad_input(self, total: Tensor, grad: Tensor) -> None:
        """Add the gradient of the input to `total` (tokens, in). grad: (tokens, out)."""
        total.addmm_(grad, self.dequantize())

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out); differentiable in x only."""
        flat = x.reshape(-1, self.in_features)
        # Without gradients, autograd's bookkeeping would be a large part of one token's time.
        y: Tensor = (
            _FrozenProduct.apply(flat, self) if torch.is_grad_enabled() else self.product(flat)
        )
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


def _pieces(pieces: Sequence[_T], weight: Tensor) -> Sequence[_T]:
    """Return all pieces, or the first PIECES_ON_META of a weight on meta."""
    return pieces[:PIECES_ON_META] if weight.is_meta else pieces


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
