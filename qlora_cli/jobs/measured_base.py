"""The base of a recipe as it is measured: on which rows, and for which recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.compare.eval_rows import EvalRows, Limits, training_rows
from qlora_cli.files.dtype import file_dtype
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.memory.device import inspect_device
from qlora_cli.models.base_format import base_format_of
from qlora_cli.quantize.inputs import measure_inputs
from qlora_cli.quantize.measurement import MeasuredBase
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of

LIMITS = Limits(rows=64, tokens=4096)
"""Rows that are measured: enough for the order of the linears, and quick on a CPU."""


def check_method(recipe: Recipe) -> None:
    """Raise UsageError if the base of a recipe cannot be measured."""
    if recipe.adapter.method == "full":
        raise UsageError(
            "full fine-tuning does not quantize the base", where="adapter.method", hint="use lora"
        )
    if recipe.task == "classification":
        raise UsageError(
            "the cost is measured by predicted tokens, which a classifier does not have",
            where="task",
            hint="set base.bits or base.overrides by hand",
        )


def in_4_bit(recipe: Recipe) -> Recipe:
    """Return the recipe with all linears in 4 bit."""
    return with_settings(recipe, "base", bits=4, overrides={}, budget=None)


def measured_base(prepared: Prepared, rows: EvalRows, observer: Observer) -> MeasuredBase:
    """Return the base of a prepared recipe, to be measured on these rows.

    With `scales: measured` and no file of the inputs, they are measured first.
    """
    base = _base_on(prepared, rows)
    if prepared.recipe.base.scales != "measured" or base.importance:
        return base
    squares, _ = measured_squares(prepared, observer)
    return replace(base, importance=squares)


def check_rows(rows: EvalRows) -> None:
    """Raise UsageError if no rows of the recipe can be measured."""
    if not rows.is_task_data:
        raise UsageError(
            f"there are no rows to measure: {'; '.join(rows.notes)}", where="data.train"
        )


def measured_squares(prepared: Prepared, observer: Observer) -> tuple[Mapping[str, Tensor], str]:
    """Return path -> mean squares of the inputs of each linear, and the origin of the rows.

    Training rows are used, so that held-out rows stay unseen. Raises UsageError if there are none,
    or if the task has no predicted tokens.
    """
    check_method(prepared.recipe)
    rows = training_rows(prepared.recipe, prepared.folder, prepared.config, LIMITS)
    check_rows(rows)
    # The bits may be chosen later, and have no effect on the inputs.
    plain = replace(prepared, recipe=in_4_bit(prepared.recipe))
    return measure_inputs(_base_on(plain, rows), observer), rows.origin


def _base_on(prepared: Prepared, rows: EvalRows) -> MeasuredBase:
    recipe = prepared.recipe
    # The plan may be for another device. The first process of several measures for all.
    device = torch.device(inspect_device().kind)
    base_format = base_format_of(recipe, file_dtype(prepared.config))
    given = (task_of(recipe), prepared.folder, prepared.config, base_format.default)
    return MeasuredBase(*given, rows.rows, device, base_format.importance)
