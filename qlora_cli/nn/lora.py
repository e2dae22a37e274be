"""LoRA: y = x W^T + b + (alpha / rank) x A^T B^T, with W packed and frozen (Hu et al. 2021, 4.1).

One layer may carry several parts. A plain projection has one, named by its role; a fused q/k/v
projection has one for each targeted role, and each writes only its own rows of the output, so that
q and v can be adapted without touching k.

The product is one autograd function, because composed of modules it would keep two more copies of
its inputs; it saves x and x A^T and nothing else. Gradients were checked against float64 (tests).

Shapes: x (tokens, in), lora_a (rank, in), lora_b (rows, rank), y (tokens, out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_cli.memory.tracker import host_memory
from qlora_cli.nn.quant import QuantLinear


@dataclass(frozen=True)
class Settings:
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


class LoraLinear(nn.Module):
    """A packed linear and its adapter. `parts` maps a role to its rows of the output."""

    def __init__(self, base: QuantLinear, parts: Mapping[str, slice], settings: Settings) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out); differentiable in x, A and B."""
        x2 = x.reshape(-1, self.base.in_features)
        dropped = x2
        if self.training and self.settings.dropout:
            dropped = functional.dropout(x2, self.settings.dropout)
        factors = [factor for role in self.parts for factor in self._factors(role)]
        y: Tensor = _LoraProduct.apply(x2, dropped, self, *factors)
        return y.view(*x.shape[:-1], self.base.out_features)

    def _factors(self, role: str) -> tuple[Tensor, Tensor]:
        return self.lora_a[role], self.lora_b[role]


class _LoraProduct(torch.autograd.Function):
    """The packed product plus every part's low-rank product, added in place."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        dropped: Tensor,
        layer: LoraLinear,
        *factors: Tensor,
    ) -> Tensor:
        y = layer.base.product(x)
        narrow = []
        for rows, a, b in _parts(layer, factors):
            xa = dropped @ a.to(x.dtype).t()
            y[:, rows].addmm_(xa, b.to(x.dtype).t(), alpha=layer.settings.scaling)
            narrow.append(xa)
        ctx.save_for_backward(dropped, *narrow, *factors)
        ctx.layer = layer  # type: ignore[attr-defined]
        # Without dropout both inputs are one tensor, and its gradient is one sum.
        ctx.shared = dropped is x  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        layer: LoraLinear = ctx.layer  # type: ignore[attr-defined]
        shared: bool = ctx.shared  # type: ignore[attr-defined]
        num_parts = len(layer.parts)
        dropped, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        narrow, factors = saved[:num_parts], saved[num_parts:]
        wants_input: bool = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        grad_x = layer.base.grad_input(grad) if wants_input else None
        grad_dropped = None if shared or not wants_input else torch.zeros_like(dropped)
        into = grad_x if shared else grad_dropped
        grads: list[Tensor | None] = []
        for xa, (rows, a, b) in zip(narrow, _parts(layer, factors), strict=True):
            grad_rows = grad[:, rows]
            grad_b = (grad_rows.t() @ xa).mul_(layer.settings.scaling)
            grad_xa = (grad_rows @ b.to(grad.dtype)).mul_(layer.settings.scaling)
            grads += [(grad_xa.t() @ dropped).to(a.dtype), grad_b.to(b.dtype)]
            if into is not None:
                into.addmm_(grad_xa, a.to(grad.dtype))
        return (grad_x, grad_dropped, None, *grads)


def _parts(
    layer: LoraLinear, factors: tuple[Tensor, ...] | list[Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each part's rows, A and B."""
    yield from zip(layer.parts.values(), factors[0::2], factors[1::2], strict=True)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every adapted linear with its path, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module
