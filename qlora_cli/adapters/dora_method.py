"""The adapter method `dora`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.dora import DoraLinear
from qlora_cli.adapters.lora_method import LoraMethod
from qlora_cli.errors import Problem, ProblemsError
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site


@dataclass(frozen=True)
class DoraMethod(LoraMethod):
    """The adapter method `dora`: A, B and the magnitude m of the targeted linears train."""

    name = "dora"

    def adapted_roles(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Return path -> adapted roles of each targeted site. Raises ProblemsError."""
        roles = super().adapted_roles(sites)
        if any(site.num_experts and site.path in roles for site in sites):
            raise ProblemsError(
                "DoRA is not supported on experts",
                [Problem("adapter.method", "must be lora with experts in adapter.targets")],
                hint="PEFT has no DoRA on experts either",
            )
        return roles

    def wrap(self, linear: QuantLinear, lora_slices: Mapping[str, slice]) -> DoraLinear:
        """Return a DoRA layer around a packed linear. lora_slices: adapted role -> its rows."""
        return DoraLinear(linear, lora_slices, self._settings_of(lora_slices))

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield A, B and m of every layer."""
        yield from super().trained_parameters(model)
        for _, layer in adapted_layers(model):
            assert isinstance(layer, DoraLinear)
            yield from layer.lora_magnitude.values()
