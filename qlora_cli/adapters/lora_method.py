"""The adapter method `lora`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_cli.adapters.adapted_modules import adapted_modules
from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.adapters.lora_experts import LoraStack
from qlora_cli.adapters.targets import adapted_roles
from qlora_cli.errors import Problem, ProblemsError
from qlora_cli.files.dtype import torch_dtype
from qlora_cli.memory.scopes import module_scope, scope
from qlora_cli.nn.expert_stack import ExpertStack
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.recipe.adapter import Adapter


@dataclass(frozen=True)
class LoraMethod:
    """The adapter method `lora`: A and B of the targeted linears and experts train.

    targets: role names, module paths, or `all`. lr_ratio: learning rate of B / that of A.
    """

    targets: str | Sequence[str]
    settings: LoraSettings
    lr_ratio: float = 1.0

    name = "lora"
    freezes_base = True

    @classmethod
    def from_recipe(cls, section: Adapter) -> LoraMethod:
        """Create the method from the recipe's section `adapter`."""
        dtype = torch_dtype(section.dtype)
        settings = LoraSettings(section.rank, section.alpha, section.dropout, dtype, section.rslora)
        return cls(section.targets, settings, section.lr_ratio)

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return path -> adapted roles of each targeted site. Raises ProblemsError."""
        roles = adapted_roles(sites, self.targets)
        if self.settings.dropout and any(site.num_experts and site.path in roles for site in sites):
            raise ProblemsError(
                "dropout is not supported for adapters on experts",
                [Problem("adapter.dropout", "must be 0 with experts in adapter.targets")],
                hint="PEFT cannot compute such an adapter either; write adapter.dropout=0",
            )
        return roles

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> LoraLinear:
        """Return a LoRA layer around a packed linear. lora_slices: adapted role -> its rows."""
        return LoraLinear(linear, lora_slices, self.settings)

    def wrap_stack(self, stack: ExpertStack) -> LoraStack:
        """Return a LoRA module around the packed weights of experts."""
        return LoraStack(stack, self.settings)

    def initialize(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Create A and B of every LoRA module on `device`."""
        generator = torch.Generator().manual_seed(seed)
        with scope("adapter"):
            for path, module in adapted_modules(model):
                with module_scope(path):
                    module.initialize(device, generator)

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield A and B of every LoRA module."""
        for _, module in adapted_modules(model):
            yield from module.lora_a.values()
            yield from module.lora_b.values()

    def lr_factors(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Return the factor of every B if it is not 1 (LoRA+, Hayou 2024)."""
        if self.lr_ratio == 1:
            return {}
        modules = (module for _, module in adapted_modules(model))
        return {b: self.lr_ratio for module in modules for b in module.lora_b.values()}
