"""Rotary positions in three operations (Su et al. 2021), with their gradient.

Composed in Python, they need a negation, a concatenation and three more operations for the queries
and again for the keys, and twice as many in the backward pass.

Shapes: q (B, H, T, D), k (B, G, T, D), cos and sin (B, T, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the rotated queries and keys; the signature is that of transformers."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if not torch.is_grad_enabled():
        return _rotated(q, cos, sin), _rotated(k, cos, sin)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


def rotates_halves(function: Callable[..., Any] | None) -> bool:
    """Return whether a function of transformers computes what `rotate` does, on small values."""
    if function is None:
        return False
    values = torch.arange(96, dtype=torch.float32, device="cpu").mul_(1.7).sin_()
    q, k = values[:64].view(1, 2, 4, 8), values[64:].view(1, 1, 4, 8)
    cos, sin = values[:32].cos().view(1, 4, 8), values[32:64].sin().view(1, 4, 8)
    with torch.no_grad():
        try:
            found = function(q, k, cos, sin)
        except (TypeError, RuntimeError, ValueError):
            return False
        return all(
            isinstance(own, Tensor) and own.shape == wanted.shape and torch.allclose(own, wanted)
            for own, wanted in zip(found, rotate(q, k, cos, sin), strict=True)
        )


class _Rotation(torch.autograd.Function):
    """y = x cos + (-x2, x1) sin with the halves x1 and x2 of x. It saves cos and sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_x = grad * cos
        (first, second), (sin1, sin2) = grad.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        grad1, grad2 = grad_x.chunk(2, dim=-1)
        grad1.addcmul_(second, sin2)
        grad2.addcmul_(first, sin1, value=-1)
        return grad_x.to(ctx.dtype), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x * cos
    (x1, x2), (sin1, sin2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    y1, y2 = y.chunk(2, dim=-1)
    y1.addcmul_(x2, sin1, value=-1)
    y2.addcmul_(x1, sin2)
    return y
