"""RMSNorm that keeps its input as it came and one factor a row (Zhang and Sennrich 2019).

transformers' own, composed of plain operations, keeps a float32 copy of its input for backward:
4 bytes a value where the input has 2. Values are the same to the last bit; the gradient differs
from the composed one by the order in which float32 numbers are added.

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
        """x (..., d) -> (..., d) in its dtype; differentiable in x only."""
        y: Tensor = _RmsNorm.apply(x, self.weight, self.epsilon)
        return y


class _RmsNorm(torch.autograd.Function):
    """Sums and factors are float32 at least; rounded to 16 bit where transformers rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(_accumulated_in(x), copy=True)
        factor = wide.square_().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        del wide
        ctx.save_for_backward(x, factor, weight)
        return torch.mul(x, factor, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """With g = weight * grad and r the factor: r g - r^3 x mean(g x)."""
        x, factor, weight = ctx.saved_tensors
        wide = _accumulated_in(x)
        weighted = grad * weight
        along = torch.mul(weighted, x, out=torch.empty_like(x, dtype=wide))
        along = along.mean(dim=-1, keepdim=True).mul_(factor.pow(3))
        grad_x = weighted * factor
        del weighted
        return grad_x.sub_(x * along).to(x.dtype), None, None


def _accumulated_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
