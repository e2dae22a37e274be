"""What methods without adapter layers have in common: no linear is wrapped and nothing is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Self

import torch
from torch import nn

from qlora_cli.nn.expert_stack import ExpertStack
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.recipe.adapter import Adapter


@dataclass(frozen=True)
class NoLayers:
    """The parts of an `AdapterMethod` that depend on its layers, for a method that has none."""

    @classmethod
    def from_recipe(cls, section: Adapter) -> Self:
        """Create the method. It has no settings."""
        return cls()

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return no roles: no linear has an adapter."""
        return {}

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> NoReturn:
        """Never called, because no linear has an adapter."""
        raise AssertionError("the method wraps no linear")

    def wrap_stack(self, stack: ExpertStack) -> NoReturn:
        """Never called, because no expert has an adapter."""
        raise AssertionError("the method wraps no experts")

    def initialize(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Do nothing: the method has no parameters of its own."""

    def lr_factors(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Return no factors: every parameter has the same learning rate."""
        return {}
