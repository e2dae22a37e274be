"""A linear layer over a packed, frozen weight: 4 bit (NF4, FP4), 8 bit (LLM.int8()) or 16 bit.

Why not bitsandbytes' modules: they cannot be built on imagined tensors, their int8 product keeps
its input where checkpointing cannot drop it, and on some CPUs an eval() forward repacks
Linear4bit's weight in place so that LoRA's gradients silently become None. Its functional
operations are exact and are what this file is built on; dequantize and matmul stay visible to the
memory tracker.

Packed weights are parameters, not buffers, because distributed engines shard parameters. Nothing
here is kept on an autograd context: backward asks the layer for its weight again.

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

BLOCK_4BIT = 64
"""Weights that share a scale (QLoRA's default)."""
BLOCK_SCALES = 256
"""Scales that share a scale of their own, with double quantization."""
OUTLIER_SHARE = 8
"""Beyond in / 8 outlier columns the whole product is done in the compute dtype. LLM.int8() finds
about 0.1 % of columns; the cap makes the memory of the outlier part bounded and so plannable."""
PACK_ELEMENTS = 2**20
"""Weights packed at once, a multiple of every block. On a CPU bitsandbytes holds up to 28 bytes for
each while it works; on a whole gate projection of an 8B model that would be 1.5 GiB."""

_T = TypeVar("_T")
_TINY = torch.finfo(torch.float32).tiny
_ops = torch.ops.bitsandbytes


@dataclass(frozen=True)
class WeightFormat:
    """How a base weight is held and what it computes in.

    storage: of 16-bit weights. threshold: LLM.int8()'s outlier threshold, 0 for none.
    """

    bits: int
    compute: torch.dtype
    storage: torch.dtype
    quant_type: str = "nf4"
    double_quant: bool = True
    threshold: float = 6.0

    def plain(self) -> WeightFormat:
        """The same, unquantized: for heads and for what must not be packed."""
        return WeightFormat(16, self.compute, self.storage)


class QuantLinear(nn.Module):
    """y = x W^T + b with W packed and frozen. Made empty; `pack` fills it.

    category: of the ledger, where its weight is counted.
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
        """Takes a full weight (out, in) on the device it shall live on; keeps no copy of it.

        Raises AssertionError on a wrong shape.
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
        scale = torch.empty(-(-flat.numel() // BLOCK_4BIT), device=device)
        for start in _enough(range(0, flat.numel(), PACK_ELEMENTS), flat):
            codes, scales = _ops.quantize_4bit(
                flat[start : start + PACK_ELEMENTS],
                BLOCK_4BIT,
                self.weight_format.quant_type,
                torch.uint8,
            )
            packed[start // 2 :][: codes.shape[0]] = codes
            scale[start // BLOCK_4BIT :][: scales.shape[0]] = scales
        self.weight = _frozen(packed)
        if not self.weight_format.double_quant:
            self.scale = _frozen(scale)
            return
        offset = scale.mean()
        codes, scale_of_scale = _ops.quantize_blockwise(
            scale - offset, code_of_scales(scale.device), BLOCK_SCALES
        )
        self.scale = _frozen(codes)
        self.scale_of_scale = _frozen(scale_of_scale)
        self.offset_of_scale = _frozen(offset)

    def _pack_8bit(self, weight: Tensor) -> None:
        packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(self.out_features, device=weight.device)
        num_rows = max(1, PACK_ELEMENTS // self.in_features)
        pieces = zip(*(t.split(num_rows) for t in (weight, packed, scale)), strict=True)
        for rows, codes, own in _enough(list(pieces), weight):
            # An all-zero row has scale 0 and would divide by it.
            own.copy_(rows.abs().amax(dim=1).float() / 127).clamp_min_(_TINY)
            codes.copy_(torch.div(rows, own[:, None]).round_())
        self.weight, self.scale = _frozen(packed), _frozen(scale)

    def constants(self) -> Iterator[nn.Parameter]:
        """The scales of a packed weight."""
        for constant in (self.scale, self.scale_of_scale, self.offset_of_scale):
            if constant is not None:
                yield constant

    def dequantize(self) -> Tensor:
        """The frozen values (out, in) in the compute dtype: what the adapter is trained on."""
        with scope("temporary"):
            if self.weight_format.bits == 16:
                return self.weight.to(self.weight_format.compute)
            if self.weight_format.bits == 8:
                return self._scaled(self.weight)
            assert self.scale is not None
            return _ops.dequantize_4bit(  # type: ignore[no-any-return]
                self.weight,
                self._block_scales(),
                BLOCK_4BIT,
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
            code_of_scales(self.scale.device),
            BLOCK_SCALES,
            torch.float32,
        )
        assert self.offset_of_scale is not None
        return scale.add_(self.offset_of_scale)

    def _scaled(self, columns: Tensor) -> Tensor:
        """int8 columns (out, n) as compute dtype; multiplied in float32, rounded once."""
        assert self.scale is not None
        out = torch.empty(columns.shape, dtype=self.weight_format.compute, device=columns.device)
        return torch.mul(columns, self.scale[:, None], out=out)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b, outside autograd."""
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
        if columns.numel() > self.in_features // OUTLIER_SHARE:
            del magnitudes
            return x @ self.dequantize().t()
        with scope("temporary"):
            # Outliers are set to zero in what is made of x anyway, not in a copy of x.
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
        """Gradient (tokens, in) of the input from that of the output (tokens, out)."""
        return grad @ self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out); differentiable in x only."""
        y: Tensor = _FrozenProduct.apply(x.reshape(-1, self.in_features), self)
        return y.view(*x.shape[:-1], self.out_features)


class _FrozenProduct(torch.autograd.Function):
    """A product whose weight needs no gradient: nothing is saved for backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return layer.product(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.grad_input(grad), None  # type: ignore[attr-defined]


_codes: dict[torch.device, Tensor] = {}


def forget_codes(device: torch.device) -> None:
    """So that a plan counts them each time, as a fresh process does."""
    _codes.pop(device, None)


def code_of_scales(device: torch.device) -> Tensor:
    """The 256 values that quantized scales stand for, one copy a device.

    Kept here and not in bitsandbytes' own cache, which a plan on `meta` would poison.
    """
    if device not in _codes:
        with scope("quant_constants"):
            _codes[device] = bnb_functional.create_dynamic_map().to(device)
    return _codes[device]


def _outlier_columns(magnitudes: Tensor, threshold: float) -> Tensor:
    """Indices of the columns of |x| with a value beyond the threshold.

    On imagined tensors: the most columns for which the mixed product is still used, its bound.
    """
    if threshold == 0:
        return torch.empty(0, dtype=torch.long, device=magnitudes.device)
    beyond = (magnitudes > threshold).any(dim=0)
    if magnitudes.is_meta:
        return torch.empty(beyond.shape[0] // OUTLIER_SHARE, dtype=torch.long, device="meta")
    return beyond.nonzero().flatten()


def _enough(pieces: Sequence[_T], weight: Tensor) -> Sequence[_T]:
    """All pieces; of an imagined weight the first two, because the others take what these take."""
    return pieces[:2] if weight.is_meta else pieces


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
