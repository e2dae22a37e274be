"""RMSNorm that saves its input in its own dtype and one factor per row (Zhang and Sennrich 2019).

transformers' RMSNorm is composed of plain operations and saves a float32 copy of its input for the
backward pass: 4 bytes per value if the input has 2. The output here is equal to the last bit. The
gradient differs only by the order in which float32 numbers are added.

Shapes: x (..., d), weight (d,), factor (..., 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        dtype = _accumulation_dtype(x)
        weighted = grad * weight
        projection = torch.mul(weighted, x, out=torch.empty_like(x, dtype=dtype))
        projection = projection.mean(dim=-1, keepdim=True).mul_(factor.pow(3))
        grad_x = weighted * factor
        del weighted
        return grad_x.sub_(x * projection).to(x.dtype), None, None


def _normalize(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return (y, factor)."""
    accumulator = x.to(_accumulation_dtype(x), copy=True)
    factor = accumulator.square_().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
    del accumulator
    return torch.mul(x, factor, out=torch.empty_like(x)).mul_(weight), factor


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
