"""Plans recipes on the largest batches that they allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_cli.data.collate import largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import Problem, RecipeError
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of

_MAX_TOKENS = 2**24
"""Largest number of tokens in a micro-batch that is planned."""


class Planner:
    """Plans recipes for one base and one device. Each recipe is planned once.

    config: transformers' config of the base. profile: the target device. has_copy: returns whether
    the base of a resolved recipe is loaded from its packed copy.
    """

    def __init__(
        self,
        config: Any,
        profile: DeviceProfile,
        has_copy: Callable[[Recipe], bool] = lambda _: False,
    ) -> None:
        self.config = config
        self.profile = profile
        self._has_copy = has_copy
        self._plans: dict[str, MemoryPlan] = {}

    def plan(self, recipe: Recipe) -> MemoryPlan:
        """Return the plan of a resolved recipe. Raises the errors of `plan_largest_batches`."""
        key = recipe.model_dump_json()
        if key not in self._plans:
            self._plans[key] = plan_largest_batches(
                recipe, self.config, self.profile, self._has_copy(recipe)
            )
        return self._plans[key]

    def fits(self, plan: MemoryPlan) -> bool:
        """Return whether a planned job fits the device."""
        return plan.fits(self.profile.usable_bytes)


def plan_largest_batches(
    recipe: Recipe, config: Any, profile: DeviceProfile, has_copy: bool = False
) -> MemoryPlan:
    """Plan a resolved recipe on the largest batches that it allows; no data file is read.

    has_copy: as of `dry_run`. Raises RecipeError if a micro-batch has more tokens than can be
    planned, and the errors of `dry_run`.
    """
    tokens = recipe.data.seq_len * recipe.train.micro_batch
    if tokens > _MAX_TOKENS:
        raise RecipeError(
            "the micro-batch is too large to plan",
            [
                Problem(
                    "data.seq_len",
                    f"data.seq_len x train.micro_batch is {tokens:,} tokens; "
                    f"at most {_MAX_TOKENS:,} can be planned",
                )
            ],
        )
    sizes, segments = (recipe.data.seq_len, recipe.train.micro_batch), num_segments(recipe)
    batch = largest_batch(*sizes, config.vocab_size, segments=segments)
    step_batches = [batch] * min(2, recipe.train.grad_accum)
    return dry_run(recipe, config, profile, step_batches, [batch], has_copy)


def num_segments(recipe: Recipe) -> int:
    """Return the number of segments of a row of the recipe's task."""
    return max(1, len(task_of(recipe).segment_names))
