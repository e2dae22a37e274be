"""Full fine-tuning: no adapter, every parameter of the model trains. For comparison with LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from qlora_cli.nn.expert_stack import ExpertStack
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.recipe.adapter import Adapter


@dataclass(frozen=True)
class FullFineTuning:
    """The adapter method `full`: no layer is wrapped and nothing is merged."""

    name = "full"
    freezes_base = False

    @classmethod
    def from_recipe(cls, section: Adapter) -> FullFineTuning:
        """Create the method. It has no settings."""
        return cls()

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return no roles: no linear has an adapter."""
        return {}

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> NoReturn:
        """Never called, because no linear has an adapter."""
        raise AssertionError("full fine-tuning wraps no linear")

    def wrap_stack(self, stack: ExpertStack) -> NoReturn:
        """Never called, because no expert has an adapter."""
        raise AssertionError("full fine-tuning wraps no experts")

    def initialize(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Do nothing: the method has no parameters of its own."""

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield every parameter."""
        yield from model.parameters()

    def lr_factors(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Return no factors: every parameter has the same learning rate."""
        return {}
