"""LoRA: y = x W^T + b + (alpha / rank) x A^T B^T, with W packed and frozen (Hu et al. 2021, 4.1).

A layer has one adapter for each adapted role. A plain projection has one role. A fused q/k/v
projection has three, and each adapter changes only the rows of its role: q and v can be adapted
without k.

Shapes: x (tokens, in), lora_a (rank, in), lora_b (rows, rank), y (tokens, out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import host_memory
from qlora_cli.nn.lora_matmul import AdaptedLinear, LoraMatmul, LoraSlice, draw_seed
from qlora_cli.nn.lora_product import lora_product
from qlora_cli.nn.quant import QuantLinear


@dataclass(frozen=True)
class LoraSettings:
    """The settings of a LoRA layer. dtype: dtype of A and B. rslora: scale by sqrt(rank)."""

    rank: int
    alpha: float
    dropout: float
    dtype: torch.dtype
    rslora: bool

    @property
    def scaling(self) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def doubled(self) -> LoraSettings:
        """Return the settings of twice the rank with the same scaling."""
        factor = math.sqrt(2) if self.rslora else 2
        return replace(self, rank=2 * self.rank, alpha=factor * self.alpha)


@dataclass(frozen=True)
class Factors:
    """The factors of one role. b: (rows, rank). a: (rank, in)."""

    b: Tensor
    a: Tensor


class LoraLinear(AdaptedLinear):
    """A packed linear with one LoRA adapter for each adapted role.

    lora_slices: role -> the rows of the output that the role's adapter changes. initial: role ->
    the factors that training began with, in host memory, if the base does not equal the model of
    that moment (`adapter.init`).
    """

    def __init__(
        self, base: QuantLinear, lora_slices: Mapping[str, slice], settings: LoraSettings
    ) -> None:
        super().__init__()
        self.initial: dict[str, Factors] = {}
        self.base = base
        self.lora_slices = dict(lora_slices)
        self.settings = settings
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()

    def initialize(self, device: torch.device, generator: torch.Generator) -> None:
        """Draw A from N(0, 1/in) and set B to 0, so the adapted model equals the base (LoRA, 4.1).

        generator: on the CPU. One seed gives the same A on every device.
        """
        settings = self.settings
        for role, rows in self.lora_slices.items():
            num_rows = rows.stop - rows.start
            b = torch.zeros(num_rows, settings.rank, device=device, dtype=settings.dtype)
            shape = (settings.rank, self.base.in_features)
            a = drawn_a(shape, settings.dtype, device, generator)
            self.lora_a[role] = nn.Parameter(a)
            self.lora_b[role] = nn.Parameter(b)

    @torch.no_grad()
    def start_from(self, initial: Mapping[str, Factors]) -> None:
        """Set A and B to these values and keep them. initial: role -> factors in host memory."""
        self.initial = dict(initial)
        for role, factors in initial.items():
            self.lora_a[role].copy_(factors.a)
            self.lora_b[role].copy_(factors.b)

    def delta(self) -> Tensor:
        """Return (alpha / rank) B A as (out, in) in float32: what merging adds to W."""
        device = next(iter(self.lora_a.values())).device
        delta = torch.zeros(self.base.out_features, self.base.in_features, device=device)
        for role, rows in self.lora_slices.items():
            product = self.lora_b[role].detach().float() @ self.lora_a[role].detach().float()
            delta[rows] += self.settings.scaling * product
        return delta

    @property
    def joins(self) -> bool:
        """Return whether no mask of its own is drawn for its input."""
        return not self._dropout

    @property
    def _dropout(self) -> float:
        return self.settings.dropout if self.training else 0.0

    def start_matmul(self) -> tuple[LoraMatmul, list[Tensor]]:
        """Return (one call with its dropout seed drawn, the factors A and B of each role)."""
        settings = self.settings
        dropout = self._dropout
        slices = tuple(LoraSlice(0, rows) for rows in self.lora_slices.values())
        seed = draw_seed() if dropout and slices else None
        matmul = LoraMatmul((self.base,), slices, settings.scaling, dropout, seed)
        return matmul, [factor for role in self.lora_slices for factor in self._factors(role)]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out); differentiable in x, A and B."""
        matmul, factors = self.start_matmul()
        # Without gradients, autograd's bookkeeping would be a large part of one token's time.
        if torch.is_grad_enabled():
            (y,) = lora_product(x, matmul, factors)
        else:
            flat = x.reshape(-1, self.base.in_features)
            cast = matmul.cast(factors, x.dtype)
            (y,) = matmul.outputs(flat, matmul.lora_activations(flat, cast), cast, factors)
        return y.view(*x.shape[:-1], self.base.out_features)

    def _factors(self, role: str) -> tuple[Tensor, Tensor]:
        return self.lora_a[role], self.lora_b[role]


def drawn_a(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Return random values from N(0, 1/in). shape: (..., in).

    They are drawn in float32 on the CPU, then copied: devices have different generators.
    """
    a = torch.empty(shape, device=device, dtype=dtype)
    with host_memory():
        drawn = torch.empty(shape, device="meta" if a.is_meta else "cpu")
        if not a.is_meta:
            drawn.normal_(generator=generator)
    return a.copy_(drawn.mul_(shape[-1] ** -0.5))
