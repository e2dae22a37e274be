"""Give evaluated pairs their log-probabilities under the reference model of a finished run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from qlora_cli.data.collate import Batch
from qlora_cli.errors import UsageError
from qlora_cli.models.attach import adapter_layers_for, adapter_replaced
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.open import OpenedModel
from qlora_cli.runs.run import adapter_at
from qlora_cli.tasks.task import Task


def with_reference(
    task: Task, recipe: Recipe, opened: OpenedModel, batches: Iterable[Batch], device: torch.device
) -> Iterator[Batch]:
    """Yield the batches with the constants that the task needs, if it needs any.

    recipe: of the run. Raises UsageError if the run trained the base, whose weights before training
    are not loaded, and InputError if the adapter that it started from is gone.
    """
    if not task.needs_constants:
        yield from batches
        return
    if recipe.adapter.method == "full":
        raise UsageError(
            "the run trained all weights of the base, so the reference model of its loss is not "
            "loaded",
            hint="the held-out evaluations of the run are in its metrics.jsonl",
        )
    layers = None
    if recipe.preference.reference == "start":
        assert recipe.adapter.from_ is not None
        layers = adapter_layers_for(opened.loaded, adapter_at(Path(recipe.adapter.from_)))
    for batch in batches:
        with nullcontext() if layers is None else adapter_replaced(opened.loaded, layers):
            constants = task.constants(opened.loaded, batch, device).cpu()
        yield replace(batch, constants=constants)
