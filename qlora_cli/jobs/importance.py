"""Gives `base.scales: measured` its measurement, before anything is planned or packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_cli.errors import Problem, RecipeError
from qlora_cli.events import Observer
from qlora_cli.files.quantized import BITSANDBYTES, stored_as
from qlora_cli.jobs.measured_base import measured_squares
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.models.importance import KEY, read_importance, write_importance
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run

_SCALES = "base.scales"


def check_scales(recipe: Recipe, config: Any) -> None:
    """Raise RecipeError if the checkpoint is quantized: `base.scales` has no effect.

    config: of the base.
    """
    if recipe.base.scales != "absmax" and stored_as(config) == BITSANDBYTES:
        raise RecipeError(
            "the recipe does not fit the base",
            [Problem(_SCALES, "bitsandbytes has chosen the scales of this checkpoint")],
            hint="omit it, or name the base that the checkpoint was made from",
        )


def choose_importance(
    prepared: Prepared, run: RunFolder, earlier: Run | None, observer: Observer
) -> tuple[Prepared, tuple[Choice, ...]]:
    """Return the recipe with a file in `base.importance`, and the choice made.

    The file is in the run's folder: measured now, or a copy of that of the recipe. earlier: the run
    that is resumed, which keeps its file. Without `scales: measured` nothing changes. Raises
    UsageError if there are no rows, and for a task without predicted tokens.
    """
    check_scales(prepared.recipe, prepared.config)
    given = prepared.recipe.base.importance
    if prepared.recipe.base.scales != "measured":
        return prepared, ()
    if earlier is not None and earlier.recipe.base.importance is not None:
        return _with_file(prepared, str(run.importance)), ()
    if given is not None:
        write_importance(run.importance, read_importance(given))
        return _with_file(prepared, str(run.importance)), ()
    squares, origin = measured_squares(prepared, observer)
    write_importance(run.importance, squares)
    choice = Choice(KEY, run.importance.name, f"inputs of {len(squares)} linears on {origin}")
    prepared = replace(prepared, choices=(*prepared.choices, choice))
    return _with_file(prepared, str(run.importance)), (choice,)


def _with_file(prepared: Prepared, file: str) -> Prepared:
    return replace(prepared, recipe=with_settings(prepared.recipe, "base", importance=file))
