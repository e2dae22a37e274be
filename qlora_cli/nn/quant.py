"""A linear layer with a packed, frozen weight: 4 bit (NF4, FP4), 8 bit (LLM.int8()) or 16 bit.

This file uses the functional operations of bitsandbytes, which are exact, and not its modules. The
modules cannot be built on meta tensors. Their int8 product saves its input where activation
checkpointing cannot free it. On some CPUs a forward pass in eval mode repacks Linear4bit's weight
in place, and then LoRA's gradients silently become None. With functional operations, dequantization
and matrix product are separate operations that the memory tracker observes.

Packed weights are parameters, not buffers, because distributed engines shard parameters. No weight
is saved on an autograd context: the backward pass dequantizes it again.

Shapes: x (tokens, in), y (tokens, out), weight (out, in). Sources: Dettmers et al. 2022
(LLM.int8(), equations 3 to 8), 2023 (QLoRA, equations 4 to 6).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import attribute, scope
from qlora_cli.nn.codebook import scale_codebook
from qlora_cli.nn.int8_product import int8_product, scaled_codes
from qlora_cli.nn.packing import (
    BLOCK_SIZE_4BIT,
    WeightFormat,
    dequantized_4bit,
    dequantized_scales,
    packed_4bit,
    packed_8bit,
)
from qlora_cli.nn.scale_search import searched_4bit

PIECE_ELEMENTS = 2**25
"""Largest number of weights that a product dequantizes at once: 64 MiB in 16 bit."""

_ops = torch.ops.bitsandbytes


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
                tensors = self._packed_4bit(weight)
            elif self.weight_format.bits == 8:
                tensors = packed_8bit(weight)
            else:
                tensors = [weight.to(self.weight_format.storage).contiguous()]
            names = ("weight", "scale", "scale_of_scale", "offset_of_scale")
            for name, tensor in zip(names, tensors, strict=False):
                setattr(self, name, _frozen(tensor))
            del tensors
        attribute([self.weight], self.category)
        attribute(self.constants(), "quant_constants")
        self.renew_dequantized()

    def _packed_4bit(self, weight: Tensor) -> list[Tensor]:
        own = self.weight_format
        given = (weight, own.quant_type, own.double_quant)
        if own.scales == "absmax":
            return packed_4bit(*given)
        if own.scales == "search":
            return searched_4bit(*given, None)
        if weight.is_meta:  # A plan needs its size only.
            return searched_4bit(*given, torch.empty(self.in_features, device="meta"))
        assert own.importance is not None, "the inputs were not measured"
        return searched_4bit(*given, own.importance.to(weight.device, copy=True))

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

    @property
    def piece_bytes(self) -> int:
        """Return the bytes of the dequantized rows that a gradient of the input needs at once."""
        if self._has_whole:
            return 0
        return self._piece_rows * self.in_features * self.weight_format.compute.itemsize

    @property
    def _has_whole(self) -> bool:
        """Return whether the weight exists in the compute dtype."""
        return self._dequantized is not None or self.weight.dtype == self.weight_format.compute

    @property
    def _piece_rows(self) -> int:
        """Return the number of rows that are dequantized at once: all, or whole blocks of them."""
        num_pieces = -(-self.out_features * self.in_features // PIECE_ELEMENTS)
        if num_pieces == 1 or self._has_whole:
            return self.out_features
        rows = -(-self.out_features // num_pieces)
        return min(self.out_features, -(-rows // BLOCK_SIZE_4BIT) * BLOCK_SIZE_4BIT)

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
            return self._dequantized_rows(slice(0, self.out_features), self._scales())

    def _dequantized_pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, the weight of these rows), a few at a time.

        The caller deletes a piece before it takes the next one.
        """
        step = self._piece_rows
        if step == self.out_features:
            yield slice(0, self.out_features), self.dequantize()
            return
        with scope("temporary"):
            scale = self._scales()
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            with scope("temporary"):
                piece = [self._dequantized_rows(rows, scale)]
            yield rows, piece.pop()

    def _dequantized_rows(self, rows: slice, scale: Tensor | None) -> Tensor:
        """Return rows of the weight in the compute dtype. scale: from `_scales`."""
        compute = self.weight_format.compute
        if scale is None:
            return self.weight[rows].to(compute)
        if self.weight_format.bits == 8:
            return scaled_codes(self.weight[rows], scale[rows], compute)
        values = range(rows.start * self.in_features, rows.stop * self.in_features)
        flat = dequantized_4bit(self.weight, scale, values, self.weight_format.quant_type, compute)
        return flat.view(-1, self.in_features)

    def _scales(self) -> Tensor | None:
        """Return the scale of every block of a 4-bit weight, of every row of an 8-bit one."""
        if self.scale is None or self.scale_of_scale is None or self.offset_of_scale is None:
            return self.scale
        return dequantized_scales(self.scale, self.scale_of_scale, self.offset_of_scale)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + b without recording a graph. x: (tokens, in)."""
        self._check_weight()
        if self.weight_format.bits == 8:
            y = self._product_8bit(x)
            return y if self.bias is None else y.add_(self.bias)
        if self._fuses_token_product and x.shape[0] == 1:
            return self._fused_product(x)
        return self._dense_product(x, self.bias)

    def _check_weight(self) -> None:
        """Raise RuntimeError if `drop_packed` removed the weight; a kernel would read beyond it."""
        if not self.weight.numel():
            raise RuntimeError("the weight of this linear is not on the device")

    def _product_8bit(self, x: Tensor) -> Tensor:
        assert self.scale is not None
        y = int8_product(x, self.weight, self.scale, self.weight_format.threshold)
        return self._dense_product(x, None) if y is None else y

    def _dense_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b with the dequantized weight."""
        is_one_piece = self._piece_rows == self.out_features
        if self._has_whole or (is_one_piece and self.scale is not None):
            weight = self.dequantize().t()
            return x @ weight if bias is None else torch.addmm(bias, x, weight)
        # Allocated before the weight, which is freed first: on a CPU its place in the heap is then
        # not taken by y, and the next weight fits there. With the scales of a 4-bit weight, which
        # live while it is dequantized, the peak would be higher.
        y = x.new_empty(x.shape[0], self.out_features)
        for rows, piece in self._dequantized_pieces():
            if bias is None:
                torch.mm(x, piece.t(), out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, piece.t(), out=y[:, rows])
            del piece
        return y

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

    def grad_input(self, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """Return the gradient of the input (tokens, in). grad: (tokens, out), of the output.

        total: add the gradient to this tensor, and return it.
        """
        self._check_weight()
        for rows, piece in self._dequantized_pieces():
            part = grad[:, rows]
            total = part @ piece if total is None else total.addmm_(part, piece)
            del piece
        assert total is not None
        return total

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


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
