"""LoRA: y = x W^T + b + (alpha / rank) x A^T B^T, with W packed and frozen (Hu et al. 2021, 4.1).

One layer may carry several parts. A plain projection has one, named by its role; a fused q/k/v
projection has one for each targeted role, and each writes only its own rows of the output, so that
q and v can be adapted without touching k.

The product (`nn/product.py`) is one autograd function, because composed of modules it would keep
two more copies of its inputs; it saves x and x A^T and nothing else.

Shapes: x (tokens, in), lora_a (rank, in), lora_b (rows, rank), y (tokens, out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import host_memory
from qlora_cli.nn.lora_matmul import AdaptedLinear, LoraMatmul, draw_seed
from qlora_cli.nn.quant import QuantLinear


@dataclass(frozen=True)
class LoraSettings:
    """The adapter's recipe as the layers need it."""

    rank: int
    alpha: float
    dropout: float
    dtype: torch.dtype
    rslora: bool

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(AdaptedLinear):
    """A packed linear and its adapter. `parts` maps a role to its rows of the output."""

    def __init__(
        self, base: QuantLinear, parts: Mapping[str, slice], settings: LoraSettings
    ) -> None:
        super().__init__()
        self.base = base
        self.parts = dict(parts)
        self.settings = settings
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()

    def initialize(self, device: torch.device, generator: torch.Generator) -> None:
        """A ~ N(0, 1/in), B = 0: the adapted model starts as the base (LoRA, 4.1)."""
        settings = self.settings
        for role, rows in self.parts.items():
            num_rows = rows.stop - rows.start
            b = torch.zeros(num_rows, settings.rank, device=device, dtype=settings.dtype)
            self.lora_a[role] = nn.Parameter(self._gaussian(device, generator))
            self.lora_b[role] = nn.Parameter(b)

    def _gaussian(self, device: torch.device, generator: torch.Generator) -> Tensor:
        """A's first values; drawn on the host in float32: a seed gives the same A on any device."""
        shape = (self.settings.rank, self.base.in_features)
        a = torch.empty(shape, device=device, dtype=self.settings.dtype)
        with host_memory():
            drawn = torch.empty(shape, device="meta" if a.is_meta else "cpu")
            if not a.is_meta:
                drawn.normal_(generator=generator)
        return a.copy_(drawn.mul_(self.base.in_features**-0.5))

    def delta(self) -> Tensor:
        """(alpha / rank) B A as (out, in) in float32: what merging adds to W."""
        total = self._empty_delta()
        for role, rows in self.parts.items():
            product = self.lora_b[role].detach().float() @ self.lora_a[role].detach().float()
            total[rows] += self.settings.scaling * product
        return total

    def _empty_delta(self) -> Tensor:
        device = next(iter(self.lora_a.values())).device
        return torch.zeros(self.base.out_features, self.base.in_features, device=device)

    def begin(self) -> tuple[LoraMatmul, list[Tensor]]:
        """(One call with its dropout settled, A and B of each part in turn)."""
        settings = self.settings
        dropout = settings.dropout if self.training else 0.0
        rows = tuple(self.parts.values())
        seed = draw_seed() if dropout and rows else None
        product = LoraMatmul(self.base, rows, settings.scaling, dropout, seed)
        return product, [factor for role in self.parts for factor in self._factors(role)]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out); differentiable in x, A and B."""
        product, factors = self.begin()
        y: Tensor = _LoraProduct.apply(x.reshape(-1, self.base.in_features), product, *factors)
        return y.view(*x.shape[:-1], self.base.out_features)

    def _factors(self, role: str) -> tuple[Tensor, Tensor]:
        return self.lora_a[role], self.lora_b[role]


class _LoraProduct(torch.autograd.Function):
    """The packed product plus every part's low-rank product; keeps x and each x A^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: LoraMatmul, *factors: Tensor) -> Tensor:
        y, narrow = product.forward(x, factors)
        ctx.save_for_backward(x, *narrow, *factors)
        ctx.product = product
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product: LoraMatmul = ctx.product
        x, *saved = ctx.saved_tensors
        narrow, factors = saved[: len(product.rows)], saved[len(product.rows) :]
        grad_narrow = product.grad_narrow(grad, factors)
        grads = product.grad_factors(x, grad, narrow, grad_narrow, factors)
        if not ctx.needs_input_grad[0]:
            return (None, None, *grads)
        return (product.grad_input(grad, grad_narrow, factors), None, *grads)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every adapted linear with its path, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module
