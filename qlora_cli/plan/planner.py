"""Plans recipes on the largest batches that they allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from qlora_cli.data.collate import Batch, largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import Problem, RecipeError
from qlora_cli.models.depth import num_blocks
from qlora_cli.plan.dry_run import DryRun
from qlora_cli.plan.limit import limit_of
from qlora_cli.plan.link_time import overlapped_seconds
from qlora_cli.plan.policy import first_chunk
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.settle import Settled, Settler
from qlora_cli.plan.speeds import nominal_speed
from qlora_cli.plan.step_time import DeviceSpeed, micro_batches, update_work
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of

_MAX_TOKENS = 2**24
"""Largest number of tokens in a micro-batch that is planned."""


class Batches(NamedTuple):
    """The batches that a recipe is planned for: as of `DryRun`."""

    step: Sequence[Batch]
    eval: Sequence[Batch]


class Planner:
    """Plans recipes for one base and one device. Each recipe is planned once.

    config: transformers' config of the base. profile: the target device. batches_of: returns the
    batches of a recipe; if not given, the largest that it allows. has_copy: returns whether the
    base of a resolved recipe is loaded from its packed copy. speed_of: returns the device's speed
    in a compute dtype, from which times are estimated; if not given, the nominal one.
    """

    def __init__(
        self,
        config: Any,
        profile: DeviceProfile,
        batches_of: Callable[[Recipe], Batches] | None = None,
        has_copy: Callable[[Recipe], bool] = lambda _: False,
        speed_of: Callable[[torch.dtype], DeviceSpeed] | None = None,
    ) -> None:
        self.config = config
        self.profile = profile
        largest = partial(largest_batches, config=config, processes=profile.count)
        self._batches_of = batches_of or largest
        self._has_copy = has_copy
        self._speed_of = speed_of or partial(nominal_speed, profile)
        self._settled: dict[str, Settled] = {}
        self._dry_runs: dict[str, DryRun] = {}
        self._seconds: dict[str, float] = {}

    def plan(self, recipe: Recipe) -> MemoryPlan:
        """Return the plan of a recipe, with its policy chosen if it is `auto`.

        Raises the errors of `settle`.
        """
        return self.settle(recipe).plan

    def settle(self, recipe: Recipe) -> Settled:
        """Return a recipe without the `auto` values that depend on memory, and its plan.

        recipe: resolved, except for these values. Raises RecipeError if a micro-batch has more
        tokens than can be planned, and the errors of `dry_run`.
        """
        key = recipe.model_dump_json()
        if key not in self._settled:
            self._settled[key] = self._settle(recipe)
        return self._settled[key]

    def fits(self, plan: MemoryPlan) -> bool:
        """Return whether a planned job fits the device."""
        return plan.fits(self.profile.usable_bytes)

    def speed(self, recipe: Recipe) -> DeviceSpeed:
        """Return the speed of the device in the compute dtype of a resolved recipe."""
        return self._speed_of(getattr(torch, recipe.base.compute_dtype))

    def seconds_per_token(self, recipe: Recipe) -> float:
        """Return the estimated time of training a resolved recipe, by its tokens."""
        key = recipe.model_dump_json()
        if key not in self._seconds:
            plan, speed = self.plan(recipe), self.speed(recipe)
            update = speed.seconds([update_work(plan.trainable_parameters)])
            micro_batch = overlapped_seconds(micro_batches(plan.segments)[-1], plan, speed)
            seconds = micro_batch + update / recipe.train.grad_accum
            self._seconds[key] = seconds / plan.num_tokens
        return self._seconds[key]

    def _settle(self, recipe: Recipe) -> Settled:
        settler = Settler(
            num_blocks(self.config),
            limit_of(self.profile),
            self._dry_run,
            self._first_chunk,
            self._nominal_speed,
            may_offload=self.profile.kind == "cuda",
            num_devices=self.profile.count,
        )
        if recipe.train.micro_batch != "auto":
            return settler.settle(recipe)
        max_size = max(1, _MAX_TOKENS // recipe.data.seq_len)
        divided, choices = settler.micro_batch(recipe, max_size)
        settled = settler.settle(divided)
        return replace(settled, choices=(*choices, *settled.choices))

    def _dry_run(self, recipe: Recipe) -> DryRun:
        """Return the dry run of a recipe with any activation policy."""
        key = with_settings(recipe, "train", activation_checkpointing=True).model_dump_json()
        if key not in self._dry_runs:
            batches = self._batches_of(recipe)
            given = (recipe, self.config, self.profile, *batches)
            self._dry_runs[key] = DryRun(*given, has_copy=self._has_copy(recipe))
        return self._dry_runs[key]

    def _nominal_speed(self, recipe: Recipe) -> DeviceSpeed:
        """Return the nominal speed, with which a plan and each start of a job choose equally."""
        return nominal_speed(self.profile, getattr(torch, recipe.base.compute_dtype))

    def _first_chunk(self, recipe: Recipe) -> int:
        batches = self._batches_of(recipe).step
        tokens = max(batch.num_tokens for batch in batches)
        return first_chunk(self.config, tokens, max(batch.num_targets for batch in batches))


def plan_largest_batches(recipe: Recipe, config: Any, profile: DeviceProfile) -> MemoryPlan:
    """Plan a recipe on the largest batches that it allows; no data file is read.

    Raises the errors of `Planner.settle`.
    """
    return Planner(config, profile).plan(recipe)


def largest_batches(recipe: Recipe, config: Any, processes: int = 1) -> Batches:
    """Return the largest batches that a recipe allows.

    processes: number of processes that share the micro-batches of a step. Raises RecipeError if a
    micro-batch has more tokens than can be planned.
    """
    seq_len, size = recipe.data.seq_len, recipe.train.pass_size
    if seq_len * size > _MAX_TOKENS:
        raise RecipeError(
            "the micro-batch is too large to plan",
            [
                Problem(
                    "data.seq_len",
                    f"data.seq_len x train.micro_batch is {seq_len * size:,} tokens; "
                    f"at most {_MAX_TOKENS:,} can be planned",
                )
            ],
        )
    batch = largest_batch(seq_len, size, config.vocab_size, segments=num_segments(recipe))
    later = recipe.train.grad_accum > processes
    return Batches([batch] * (1 + later), [batch])


def num_segments(recipe: Recipe) -> int:
    """Return the number of segments of a row of the recipe's task."""
    return max(1, len(task_of(recipe).segment_names))
