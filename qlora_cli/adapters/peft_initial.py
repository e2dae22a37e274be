"""Adapters whose training began with a product that is not 0 (`adapter.init`), in PEFT's format.

PEFT adds an adapter to the original weight W. Training began with W as well, but in two parts: a
base and s B0 A0. So the change that was trained is s (B A - B0 A0), which is one product of twice
the rank: s [B, -B0] [A; A0]. PEFT writes the same for such adapters
(`path_initial_model_for_weight_conversion`), and every program reads it as LoRA. The safetensors
header contains the method, from which the two halves are separated here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qlora_cli.adapters.lora import Factors
from qlora_cli.adapters.peft_file import AdapterFile, AdapterLayer, LoraUpdate
from qlora_cli.nn.site import Site
from qlora_cli.recipe.adapter import PISSA, Adapter

Half = Literal["trained", "initial"]


def both(trained: Factors, initial: Factors) -> Factors:
    """Return the factors of B A - B0 A0, whose rank is the sum of the ranks."""
    return Factors(
        torch.cat([trained.b, -initial.b], dim=1), torch.cat([trained.a, initial.a], dim=0)
    )


@dataclass(frozen=True)
class OwnBase:
    """What an adapter with `adapter.init` is on the base of its training.

    added: the factors that are added to that base. start: those at the start of the training.
    is_residual: the base is the residual of `start`, and not the packed weight.
    """

    added: AdapterFile
    start: AdapterFile
    is_residual: bool

    @classmethod
    def of(cls, adapter: AdapterFile, settings: Adapter) -> OwnBase | None:
        """Return it for an adapter; None if its training began with B = 0. settings: of its run."""
        if not settings.is_initialized:
            return None
        halves = (half_of(adapter, "trained"), half_of(adapter, "initial"))
        return cls(*halves, settings.init == PISSA)

    def before_training(self) -> OwnBase:
        """Return the base and the adapter at the start of the training."""
        return replace(self, added=self.start)


@dataclass(frozen=True)
class _HalfLayer(AdapterLayer):
    """The trained or the initial factors of a linear. whole: the layer with both."""

    whole: AdapterLayer
    half: Half

    def read(self) -> list[LoraUpdate]:
        """Read the updates of all roles; errors are those of the whole layer."""
        return [self._part(update) for update in self.whole.read()]

    def _part(self, update: LoraUpdate) -> LoraUpdate:
        rank, is_trained = self.settings.rank, self.half == "trained"
        columns = slice(0, rank) if is_trained else slice(rank, 2 * rank)
        b = update.b[:, columns]
        b = b if is_trained else -b
        return LoraUpdate(update.rows, update.a[columns], b, self.settings.scaling)


def half_of(adapter: AdapterFile, half: Half) -> AdapterFile:
    """Return the factors that are added to the base of the training.

    adapter: with both halves. half: those at the end of the training, or those at its start.
    """
    return replace(
        adapter, layers={path: _half(layer, half) for path, layer in adapter.layers.items()}
    )


def _half(layer: AdapterLayer, half: Half) -> AdapterLayer:
    assert layer.of_one_half is not None, layer.path
    own = layer.of_one_half
    return _HalfLayer(layer.path, layer.a, layer.b, layer.rows, own, whole=layer, half=half)


def factors_of(layer: AdapterLayer, site: Site) -> dict[str, Factors]:
    """Read role -> factors of the adapter of one linear. Raises ModelError as `read` does."""
    return {
        role: Factors(_whole(update.b), _whole(update.a))
        for role, update in zip(layer.slices_on(site), layer.read(), strict=True)
    }


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor with memory of its own size."""
    return tensor.clone(memory_format=torch.contiguous_format)
