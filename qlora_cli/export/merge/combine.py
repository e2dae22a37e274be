"""Combine several adapters on one base into one: W + sum over i of weight_i scaling_i B_i A_i.

The sum of products equals one product of stacked factors,
[weight_1 scaling_1 B_1, weight_2 scaling_2 B_2] [A_1; A_2], whose rank is the sum of the ranks. So
the code that merges and verifies one adapter also handles several. The factors are stacked in
float64, in which the product of a float32 and a weight is exact to 2^-53.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.adapters import peft_config
from qlora_cli.adapters.lora import LoraSettings
from qlora_cli.adapters.peft_file import AdapterFile, AdapterLayer, LoraUpdate, open_adapter
from qlora_cli.adapters.peft_stacks import AdapterStack
from qlora_cli.errors import UsageError
from qlora_cli.files.paths import user_path
from qlora_cli.nn.expert_stack import StackLora
from qlora_cli.nn.site import Site
from qlora_cli.runs.run import Run


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and the factor that its product scaling * B A is multiplied by."""

    adapter: AdapterFile
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """Return the entry for merge.json. `digest` is the SHA-256 over the adapter's two files."""
        folder = self.adapter.folder
        digest = hashlib.sha256()
        for name in (peft_config.CONFIG, peft_config.WEIGHTS):
            digest.update((folder / name).read_bytes())
        return {
            "folder": str(folder.resolve()),
            "weight": self.weight,
            "digest": digest.hexdigest(),
        }


@dataclass(frozen=True)
class _StackedLayer(AdapterLayer):
    """The stacked factors of one linear.

    layers: this linear's layer in each adapter that has one, and the adapter's weight.
    a, b: entries of the first adapter; only their shapes are used.
    """

    layers: tuple[tuple[AdapterLayer, float], ...]

    def read(self) -> list[LoraUpdate]:
        """Return one stacked product for each set of rows, with scaling 1, on the CPU."""
        products: dict[str, list[LoraUpdate]] = {role: [] for role in self.rows}
        for layer, weight in self.layers:
            for role, part in zip(layer.rows, layer.read(), strict=True):
                b = part.b.double() * (weight * part.scaling)
                products[role].append(LoraUpdate(part.rows, part.a.double(), b, 1.0))
        return [
            LoraUpdate(
                self.rows[role],
                torch.cat([part.a for part in parts]),
                torch.cat([part.b for part in parts], dim=1),
                1.0,
            )
            for role, parts in products.items()
        ]


@dataclass(frozen=True)
class _CombinedStack(AdapterStack):
    """The stacked factors of the experts of one parameter.

    sources: the parameter's stack in each adapter that has one, and the adapter's weight. a, b:
    entries of the first adapter; only their shapes are used.
    """

    sources: tuple[tuple[AdapterStack, float], ...]

    @property
    def num_experts(self) -> int:
        """Return the number of experts."""
        return self.sources[0][0].num_experts

    def read(self) -> StackLora:
        """Return one stacked product for each expert, with scaling 1, on the CPU."""
        parts = [(source.read(), weight) for source, weight in self.sources]
        a = torch.cat([part.a.double() for part, _ in parts], dim=1)
        b = torch.cat([part.b.double() * (weight * part.scaling) for part, weight in parts], dim=2)
        return StackLora(a, b, 1.0)


@dataclass(frozen=True)
class CombinedAdapter(AdapterFile):
    """The weighted sum of several adapters.

    weighted_adapters: the adapters of the sum. folder, config: those of the first adapter.
    """

    weighted_adapters: tuple[WeightedAdapter, ...] = ()

    def check(self, sites: Sequence[Site]) -> None:
        """Check that every adapter fits the base. Raises ProblemsError if one does not.

        sites: the linears and the stacks of experts of the base.
        """
        for weighted in self.weighted_adapters:
            weighted.adapter.check(sites)


def combine(weighted_adapters: Sequence[WeightedAdapter]) -> AdapterFile:
    """Return the weighted sum of the adapters.

    A single adapter of weight 1 is returned unchanged, so its merge is the same bit for bit. Raises
    UsageError if one of several adapters is DoRA, which is no sum.
    """
    first = weighted_adapters[0].adapter
    if len(weighted_adapters) == 1 and weighted_adapters[0].weight == 1.0:
        return first
    if any(weighted.adapter.saved for weighted in weighted_adapters):
        raise UsageError(
            "adapters with a classification head cannot be weighted or combined",
            where="--with" if len(weighted_adapters) > 1 else "--weight",
            hint="leave --weight and --with out",
        )
    for adapter in (weighted.adapter for weighted in weighted_adapters):
        if adapter.config.use_dora:
            raise UsageError(
                f"the adapter in {adapter.folder} is DoRA, which cannot be weighted or added",
                hint="merge it alone, without --weight and --with",
            )
    paths = sorted({path for weighted in weighted_adapters for path in weighted.adapter.layers})
    layers = {path: _stacked(path, weighted_adapters) for path in paths}
    paths = sorted({path for weighted in weighted_adapters for path in weighted.adapter.stacks})
    stacks = {path: _combined_stack(path, weighted_adapters) for path in paths}
    return CombinedAdapter(first.folder, first.config, layers, stacks, tuple(weighted_adapters))


def weighted_adapters_of(adapter: AdapterFile) -> tuple[WeightedAdapter, ...]:
    """Return the adapters that `combine` was called with."""
    if isinstance(adapter, CombinedAdapter):
        return adapter.weighted_adapters
    return (WeightedAdapter(adapter, 1.0),)


def open_other_adapters(run: Run, others: Sequence[tuple[Path, float]]) -> list[WeightedAdapter]:
    """Open adapters that are to be added to the run's own adapter.

    others: folders of runs or of PEFT adapters, and their factors.

    Raises UsageError if one of them was trained on another base.
    """
    opened = [WeightedAdapter(_open_on_base_of(run, where), weight) for where, weight in others]
    for weighted in opened:
        if weighted.adapter.prefix is not None:
            raise UsageError(
                f"{weighted.adapter.folder} has a prefix (adapter.prefix), which cannot be added",
                where="--with",
                hint="merge its run on its own",
            )
    return opened


def _open_on_base_of(run: Run, where: Path) -> AdapterFile:
    """Return the adapter in `where`. Raises UsageError if it was trained on another base.

    A PEFT adapter that does not name its base is checked by its shapes alone, later.
    """
    own, other = run.base_folder, Run.find(where)
    if other is not None:
        named, same = str(other.base_folder), other.base_folder.resolve() == own.resolve()
    else:
        adapter = open_adapter(user_path(where))
        named = adapter.config.base_model_name_or_path or str(own)
        same = named == run.recipe.model.name or Path(named).resolve() == own.resolve()
    if not same:
        raise UsageError(
            f"{where} was trained on {named}, and {run.path} on {own}",
            where="--with",
            hint="adapters can be combined on one base only; if both are the same base, correct "
            "base_folder in run.json or base_model_name_or_path in adapter_config.json",
        )
    return adapter if other is None else other.adapter_file


def _stacked(path: str, weighted_adapters: Sequence[WeightedAdapter]) -> _StackedLayer:
    layers = [
        (weighted.adapter.layers[path], weighted.weight)
        for weighted in weighted_adapters
        if path in weighted.adapter.layers
    ]
    first = layers[0][0]
    rows = {role: own for layer, _ in layers for role, own in layer.rows.items()}
    rank = sum(layer.settings.rank for layer, _ in layers)
    return _StackedLayer(path, first.a, first.b, rows, _settings(rank), tuple(layers))


def _combined_stack(path: str, weighted_adapters: Sequence[WeightedAdapter]) -> _CombinedStack:
    sources = [
        (weighted.adapter.stacks[path], weighted.weight)
        for weighted in weighted_adapters
        if path in weighted.adapter.stacks
    ]
    first = sources[0][0]
    rank = sum(source.settings.rank for source, _ in sources)
    return _CombinedStack(path, first.a, first.b, _settings(rank), tuple(sources))


def _settings(rank: int) -> LoraSettings:
    """Return the settings of stacked factors: scaling 1."""
    return LoraSettings(rank, float(rank), 0.0, torch.float64, False)
