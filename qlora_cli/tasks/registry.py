"""The tasks that a recipe can name."""

from __future__ import annotations

from qlora_cli.errors import Problem, RecipeError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.tasks.classification import CLASSIFICATION
from qlora_cli.tasks.preference import PREFERENCE
from qlora_cli.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (CAUSAL, PREFERENCE, CLASSIFICATION)}
"""Name in the recipe -> task. A new task is one entry here."""


def task_of(recipe: Recipe) -> Task:
    """Return the task of a recipe, with its settings.

    Raises RecipeError if this version does not implement it.
    """
    task = TASKS.get(recipe.task)
    if task is None:
        known = ", ".join(TASKS)
        raise RecipeError(
            "the recipe names a task that is not implemented",
            [Problem("task", f"{recipe.task} is not supported by this version; use {known}")],
        )
    return task.configured(recipe)
