"""RMSNorm that saves its input in its own dtype and one factor per row (Zhang and Sennrich 2019).

transformers' RMSNorm is composed of plain operations and saves a float32 copy of its input for the
backward pass: 4 bytes per value if the input has 2. On a CPU the output here is equal to the last
bit, and the gradient differs only by the order in which float32 numbers are added. A GPU uses
torch's fused kernel, one launch instead of seven, which rounds the output once instead of twice.

Shapes: x (..., d), weight (d,), factor (..., 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.nn.embedding import has_own_memory

_aten = torch.ops.aten


class RmsNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + epsilon), with a frozen weight."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d) to (..., d) in the dtype of x; differentiable in x only."""
        if not torch.is_grad_enabled():
            return _normalize(x, self.weight, self.epsilon)[0]
        y: Tensor = _RmsNorm.apply(x, self.weight, self.epsilon)
        return y


class _RmsNorm(torch.autograd.Function):
    """Sums and factors are float32 at least. It rounds to 16 bit at the places of transformers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, factor = _normalize(x, weight, epsilon)
        ctx.save_for_backward(x, factor, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return r g - r^3 x mean(g x) with g = weight * grad and the factor r."""
        x, factor, weight = ctx.saved_tensors
        if _has_kernel(x, weight):
            needed = [True, False]
            found = _aten._fused_rms_norm_backward(grad, x, weight.shape, factor, weight, needed)
            return found[0], None, None
        dtype = _accumulation_dtype(x)
        weighted = grad * weight
        projection = torch.mul(weighted, x, out=torch.empty_like(x, dtype=dtype))
        projection = projection.mean(dim=-1, keepdim=True).mul_(factor.pow(3))
        grad_x = weighted * factor
        del weighted
        return grad_x.sub_(x * projection).to(x.dtype), None, None


def _normalize(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return (y, factor)."""
    if _has_kernel(x, weight):
        if x.is_meta:  # There torch has no such kernel: it runs, and allocates for, its parts.
            return x * weight, x.new_empty((*x.shape[:-1], 1), dtype=_accumulation_dtype(x))
        y, factor = _aten._fused_rms_norm(x, weight.shape, weight, epsilon)
        return y, factor
    if x.dtype == _accumulation_dtype(x):
        y = x.square()  # The output takes the place of the squares.
        factor = _factor(y, epsilon)
    else:
        factor = _factor(x.to(_accumulation_dtype(x)).square_(), epsilon)
        y = torch.empty_like(x)
    return torch.mul(x, factor, out=y).mul_(weight), factor


def _factor(squares: Tensor, epsilon: float) -> Tensor:
    return squares.mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Return whether torch has a fused kernel: on a GPU, and in a dry run for one."""
    return (
        x.device.type in ("cuda", "meta") and has_own_memory(x.device) and x.dtype == weight.dtype
    )


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
