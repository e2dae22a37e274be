"""LoRA: y = x W^T + b + (alpha / rank) x A^T B^T, with W packed and frozen (Hu et al. 2021, 4.1).

A layer has one adapter for each adapted role. A plain projection has one role. A fused q/k/v
projection has three, and each adapter changes only the rows of its role: q and v can be adapted
without k.

The product is one autograd function (`nn/lora_matmul.py`), because a composition of modules would
save two more copies of its input. It saves x and x A^T and nothing else.

Shapes: x (tokens, in), lora_a (rank, in), lora_b (rows, rank), y (tokens, out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters.targets import adapted_roles
from qlora_cli.files.dtype import torch_dtype
from qlora_cli.memory.scopes import host_memory, module_scope, scope
from qlora_cli.nn.lora_matmul import AdaptedLinear, LoraMatmul, draw_seed
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.recipe import schema


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


class LoraLinear(AdaptedLinear):
    """A packed linear with one LoRA adapter for each adapted role.

    lora_slices: role -> the rows of the output that the role's adapter changes.
    """

    def __init__(
        self, base: QuantLinear, lora_slices: Mapping[str, slice], settings: LoraSettings
    ) -> None:
        super().__init__()
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
            self.lora_a[role] = nn.Parameter(self._draw_a(device, generator))
            self.lora_b[role] = nn.Parameter(b)

    def _draw_a(self, device: torch.device, generator: torch.Generator) -> Tensor:
        """Draw in float32 on the CPU, then copy: devices have different generators."""
        shape = (self.settings.rank, self.base.in_features)
        a = torch.empty(shape, device=device, dtype=self.settings.dtype)
        with host_memory():
            drawn = torch.empty(shape, device="meta" if a.is_meta else "cpu")
            if not a.is_meta:
                drawn.normal_(generator=generator)
        return a.copy_(drawn.mul_(self.base.in_features**-0.5))

    def delta(self) -> Tensor:
        """Return (alpha / rank) B A as (out, in) in float32: what merging adds to W."""
        device = next(iter(self.lora_a.values())).device
        delta = torch.zeros(self.base.out_features, self.base.in_features, device=device)
        for role, rows in self.lora_slices.items():
            product = self.lora_b[role].detach().float() @ self.lora_a[role].detach().float()
            delta[rows] += self.settings.scaling * product
        return delta

    def start_matmul(self) -> tuple[LoraMatmul, list[Tensor]]:
        """Return (one call with its dropout seed drawn, the factors A and B of each role)."""
        settings = self.settings
        dropout = settings.dropout if self.training else 0.0
        slices = tuple(self.lora_slices.values())
        seed = draw_seed() if dropout and slices else None
        matmul = LoraMatmul(self.base, slices, settings.scaling, dropout, seed)
        return matmul, [factor for role in self.lora_slices for factor in self._factors(role)]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out); differentiable in x, A and B."""
        matmul, factors = self.start_matmul()
        flat = x.reshape(-1, self.base.in_features)
        # Without gradients, autograd's bookkeeping would be a large part of one token's time.
        y: Tensor = (
            _LoraProduct.apply(flat, matmul, *factors)
            if torch.is_grad_enabled()
            else matmul.forward(flat, factors)[0]
        )
        return y.view(*x.shape[:-1], self.base.out_features)

    def _factors(self, role: str) -> tuple[Tensor, Tensor]:
        return self.lora_a[role], self.lora_b[role]


class _LoraProduct(torch.autograd.Function):
    """The packed product plus the low-rank products; saves x and each x A^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matmul: LoraMatmul, *factors: Tensor) -> Tensor:
        y, lora_activations = matmul.forward(x, factors)
        ctx.save_for_backward(x, *lora_activations, *factors)
        ctx.matmul = matmul
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matmul: LoraMatmul = ctx.matmul
        x, *saved = ctx.saved_tensors
        num_adapters = len(matmul.lora_slices)
        lora_activations, factors = saved[:num_adapters], saved[num_adapters:]
        grad_activations = matmul.grad_activations(grad, factors)
        grads = matmul.grad_factors(x, grad, lora_activations, grad_activations, factors)
        if not ctx.needs_input_grad[0]:
            return (None, None, *grads)
        return (matmul.grad_input(grad, grad_activations, factors), None, *grads)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (path, layer) of every LoRA layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


@dataclass(frozen=True)
class LoraMethod:
    """The adapter method `lora`: A and B of the targeted linears train, the base is frozen.

    targets: role names, module paths, or `all`.
    """

    targets: str | Sequence[str]
    settings: LoraSettings

    name = "lora"
    freezes_base = True

    @classmethod
    def from_recipe(cls, section: schema.Adapter) -> LoraMethod:
        """Create the method from the recipe's section `adapter`."""
        dtype = torch_dtype(section.dtype)
        settings = LoraSettings(section.rank, section.alpha, section.dropout, dtype, section.rslora)
        return cls(section.targets, settings)

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return path -> adapted roles of each targeted site. Raises ProblemsError."""
        return adapted_roles(sites, self.targets)

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> LoraLinear:
        """Return a LoRA layer around a packed linear. lora_slices: adapted role -> its rows."""
        return LoraLinear(linear, lora_slices, self.settings)

    def initialize(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Create A and B of every LoRA layer on `device`."""
        generator = torch.Generator().manual_seed(seed)
        with scope("adapter"):
            for path, layer in adapted_layers(model):
                with module_scope(path):
                    layer.initialize(device, generator)

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield A and B of every LoRA layer."""
        for _, layer in adapted_layers(model):
            yield from layer.lora_a.values()
            yield from layer.lora_b.values()
