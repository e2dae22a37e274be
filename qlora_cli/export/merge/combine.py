"""Several adapters on one base as one adapter: W + sum of weight_i scaling_i B_i A_i.

The sum of products is one product of stacked factors, [w_1 s_1 B_1, w_2 s_2 B_2] [A_1; A_2], at
the sum of the ranks. So what merges and verifies one adapter does the same with several. Stacked in
float64, in which a product of a float32 and a weight is exact to 2^-53.
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
from qlora_cli.adapters.peft_file import AdapterFile, AdapterLayer, Part, open_adapter
from qlora_cli.errors import UsageError
from qlora_cli.nn.site import Site
from qlora_cli.runs.run import Run


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and what its product is multiplied by."""

    adapter: AdapterFile
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """For merge.json. digest: SHA-256 over the adapter's two files."""
        folder = self.adapter.folder
        found = hashlib.sha256()
        for name in (peft_config.CONFIG, peft_config.WEIGHTS):
            found.update((folder / name).read_bytes())
        told = {"folder": str(folder.resolve()), "weight": self.weight}
        return {**told, "digest": found.hexdigest()}


@dataclass(frozen=True)
class _StackedLayer(AdapterLayer):
    """One linear's factors of every adapter that has some. a, b: the first one's, for the shape."""

    terms: tuple[tuple[AdapterLayer, float], ...]

    def read(self) -> list[Part]:
        """A part for each set of rows, with scaling 1."""
        found: dict[str, list[Part]] = {role: [] for role in self.rows}
        for layer, weight in self.terms:
            for role, part in zip(layer.rows, layer.read(), strict=True):
                b = part.b.double() * (weight * part.scaling)
                found[role].append(Part(part.rows, part.a.double(), b, 1.0))
        return [
            Part(
                self.rows[role],
                torch.cat([part.a for part in parts]),
                torch.cat([part.b for part in parts], dim=1),
                1.0,
            )
            for role, parts in found.items()
        ]


@dataclass(frozen=True)
class CombinedAdapter(AdapterFile):
    """What the terms add up to. folder, config: the first one's."""

    terms: tuple[WeightedAdapter, ...]

    def check(self, sites: Sequence[Site]) -> None:
        """Raises ProblemsError where one of them does not belong to a base with these linears."""
        for term in self.terms:
            term.adapter.check(sites)


def combine(terms: Sequence[WeightedAdapter]) -> AdapterFile:
    """The terms' sum; a single adapter of weight 1 is itself, bit for bit."""
    first = terms[0].adapter
    if len(terms) == 1 and terms[0].weight == 1.0:
        return first
    paths = sorted({path for term in terms for path in term.adapter.layers})
    layers = {path: _stacked(path, terms) for path in paths}
    return CombinedAdapter(first.folder, first.config, layers, tuple(terms))


def weighted_adapters(adapter: AdapterFile) -> tuple[WeightedAdapter, ...]:
    """What `combine` made it from."""
    return (
        adapter.terms if isinstance(adapter, CombinedAdapter) else (WeightedAdapter(adapter, 1.0),)
    )


def open_other_adapters(
    run: Run, others: Sequence[tuple[Path, float]]
) -> list[WeightedAdapter]:
    """Adapters to add to the run's own. Raises UsageError where one is of another base."""
    return [WeightedAdapter(_open_on_base_of(run, where), weight) for where, weight in others]


def _open_on_base_of(run: Run, where: Path) -> AdapterFile:
    """Return the adapter in `where`. Raises UsageError if it was trained on another base.

    A PEFT adapter that does not name its base is checked by its shapes alone, later.
    """
    own, other = run.base_folder, Run.find(where)
    if other is not None:
        named, same = str(other.base_folder), other.base_folder.resolve() == own.resolve()
    else:
        adapter = open_adapter(where.expanduser())
        named = adapter.config.base_model_name_or_path or str(own)
        same = named == run.recipe.model.name or Path(named).resolve() == own.resolve()
    if not same:
        raise UsageError(
            f"{where} was trained on {named}, and {run.path} on {own}",
            where="--with",
            hint="adapters can be added up on one base only; if both are the same base, let "
            "base_folder in run.json or base_model_name_or_path in adapter_config.json say so",
        )
    return adapter if other is None else other.adapter_file


def _stacked(path: str, terms: Sequence[WeightedAdapter]) -> _StackedLayer:
    layers = [
        (term.adapter.layers[path], term.weight) for term in terms if path in term.adapter.layers
    ]
    first = layers[0][0]
    rows = {role: own for layer, _ in layers for role, own in layer.rows.items()}
    rank = sum(layer.settings.rank for layer, _ in layers)
    settings = LoraSettings(rank, float(rank), 0.0, torch.float64, False)
    return _StackedLayer(path, first.a, first.b, rows, settings, tuple(layers))
