"""Parameters with fixed values and gradients, for tests of optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_cli.train.optimizer import TrainingOptimizer


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(70, 65), (5,), (3, 4)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient(step: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 + step)).to(
        like.dtype
    )


def steps_of(optimizer: TrainingOptimizer, trained: list[nn.Parameter], num: int = 6) -> None:
    for step in range(num):
        for parameter in trained:
            parameter.grad = gradient(step, parameter)
        optimizer.apply(1.0, 1e-2 * (step + 1))
