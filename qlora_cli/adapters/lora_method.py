"""The adapter method `lora`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from qlora_cli.adapters.adapted_modules import adapted_modules
from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.adapters.lora_experts import LoraStack
from qlora_cli.adapters.targets import EXPERTS, adapted_roles
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

    targets: role names, module paths, or `all`. ranks, alphas: of roles whose rank or alpha is not
    that of `settings`. lr_ratio: learning rate of B / that of A. is_initialized: training begins
    with B A that is not 0 (`models/initial_factors.py`).
    """

    targets: str | Sequence[str]
    settings: LoraSettings
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    lr_ratio: float = 1.0
    is_initialized: bool = False

    name = "lora"
    freezes_base = True

    @classmethod
    def from_recipe(cls, section: Adapter) -> LoraMethod:
        """Create the method from the recipe's section `adapter`."""
        dtype = torch_dtype(section.dtype)
        settings = LoraSettings(section.rank, section.alpha, section.dropout, dtype, section.rslora)
        given = (section.ranks, section.alphas, section.lr_ratio, section.is_initialized)
        return cls(section.targets, settings, *given)

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return path -> adapted roles of each targeted site. Raises ProblemsError."""
        roles = adapted_roles(sites, self.targets)
        if self.settings.dropout and any(site.num_experts and site.path in roles for site in sites):
            raise ProblemsError(
                "dropout is not supported for adapters on experts",
                [Problem("adapter.dropout", "must be 0 with experts in adapter.targets")],
                hint="PEFT cannot compute such an adapter either; write adapter.dropout=0",
            )
        if self.is_initialized and any(site.num_experts and site.path in roles for site in sites):
            raise ProblemsError(
                "adapters on experts begin with B = 0",
                [Problem("adapter.init", "must be default with experts in adapter.targets")],
            )
        if problems := list(self._role_problems(roles)):
            raise ProblemsError("the ranks or alphas of roles do not fit the targets", problems)
        return roles

    def _role_problems(self, roles: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
        """Yield the problems of `ranks` and `alphas`. roles: path -> adapted roles."""
        adapted = list(dict.fromkeys(role for own in roles.values() for role in own))
        for key, values in (("adapter.ranks", self.ranks), ("adapter.alphas", self.alphas)):
            for role in values.keys() - set(adapted):
                known = f"adapted roles: {', '.join(adapted)}"
                yield Problem(key, f"{role!r} is not an adapted role", known)
        fused: dict[tuple[str, ...], str] = {}
        for path, own in roles.items():
            fused.setdefault(tuple(own), path)
        for own, path in fused.items():
            if len({self._settings_of([role]) for role in own}) > 1:
                yield Problem(
                    "adapter.ranks and adapter.alphas",
                    f"{', '.join(own)} are rows of one linear ({path}), for which PEFT has one "
                    "rank and one alpha",
                    "give these roles the same ones",
                )

    def _settings_of(self, roles: Iterable[str]) -> LoraSettings:
        """Return the settings of a linear. roles: its adapted roles, which have the same ones."""
        role, settings = next(iter(roles)), self.settings
        return replace(
            settings,
            rank=self.ranks.get(role, settings.rank),
            alpha=self.alphas.get(role, settings.alpha),
        )

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> LoraLinear:
        """Return a LoRA layer around a packed linear. lora_slices: adapted role -> its rows."""
        return LoraLinear(linear, lora_slices, self._settings_of(lora_slices))

    def wrap_stack(self, stack: ExpertStack) -> LoraStack:
        """Return a LoRA module around the packed weights of experts."""
        return LoraStack(stack, self._settings_of([EXPERTS]))

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
