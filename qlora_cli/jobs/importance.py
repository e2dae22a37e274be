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


def check_scales(recipe: Recipe, config: Any) -> None:
    """Raise RecipeError if `base.scales` is set for a base that bitsandbytes has quantized.

    config: of the base.
    """
    if recipe.base.scales != "absmax" and stored_as(config) == BITSANDBYTES:
        raise RecipeError(
            "the recipe does not fit the base",
            [Problem("base.scales", "bitsandbytes has chosen the scales of this checkpoint")],
            hint="omit it, or name the base that the checkpoint was made from",
        )


def choose_importance(
    prepared: Prepared, run: RunFolder, earlier: Run | None, observer: Observer
) -> tuple[Prepared, tuple[Choice, ...]]:
    """Return the job with `base.importance` set to a file of the run, and the choice made, if any.

    The inputs are measured now, or copied from the file that the recipe names. run: folder of the
    run. earlier: the run that is resumed, which keeps its file. Without `scales: measured` nothing
    changes. Raises UsageError if there are no rows to measure, or if the task has no predicted
    tokens, and the errors of `check_scales` and `read_importance`.
    """
    check_scales(prepared.recipe, prepared.config)
    base = prepared.recipe.base
    if base.scales != "measured":
        return prepared, ()
    made: tuple[Choice, ...] = ()
    has_file = earlier is not None and earlier.recipe.base.importance is not None
    if not has_file and base.importance is not None:
        write_importance(run.importance, read_importance(base.importance))
    elif not has_file:
        squares, origin = measured_squares(prepared, observer)
        write_importance(run.importance, squares)
        reason = f"inputs of {len(squares)} linears on {origin}"
        made = (Choice(KEY, run.importance.name, reason),)
    recipe = with_settings(prepared.recipe, "base", importance=str(run.importance))
    return replace(prepared, recipe=recipe, choices=(*prepared.choices, *made)), made
