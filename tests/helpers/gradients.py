"""Values and gradients for comparing two implementations of a layer."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normally distributed values, drawn in float64 and rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def grads(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a fixed weighted sum of `y` with respect to `inputs`."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    return list(torch.autograd.grad(y, inputs, weights))
