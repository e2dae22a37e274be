"""Chooses the settings of a training job that depend on planned memory, or reads them from a run.

A run that is resumed keeps the settings with which it was started, so that it computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qlora_cli.jobs.prepare import Prepared, TrainingJob
from qlora_cli.plan.planner import Batches, Planner
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe import activations
from qlora_cli.recipe.change import with_values
from qlora_cli.recipe.resolve import RESIDENCY, Choice
from qlora_cli.runs.run import Run
from qlora_cli.train.shortage import recorded_shortages

_KEYS = (activations.KEY, activations.OFFLOAD_KEY, "train.loss_chunk", RESIDENCY)


def with_stored_settings(prepared: Prepared, earlier: Run) -> Prepared:
    """Return the recipe with the values of an earlier process of its run in place of `auto`.

    A policy that was replaced because memory ran short stays replaced. Settings that the run does
    not have, because an older version made it, stay `auto`.
    """
    train, stored = prepared.recipe.train, earlier.recipe.train
    values: dict[str, object] = {}
    for key in _KEYS:
        section, _, name = key.partition(".")
        own, earlier_own = (getattr(r, section) for r in (prepared.recipe, earlier.recipe))
        if getattr(own, name) == "auto" and getattr(earlier_own, name) != "auto":
            values[key] = getattr(earlier_own, name)
    shortages = recorded_shortages(earlier.record)
    if shortages and activations.KEY in values:
        values[activations.KEY] = shortages[-1].recomputed_blocks
    if train.micro_batch == "auto" and stored.pass_size * stored.grad_accum == train.grad_accum:
        values["train.micro_batch"] = stored.pass_size
        values["train.grad_accum"] = stored.grad_accum
    reasons = {entry["key"]: entry["reason"] for entry in earlier.record.get("choices", ())}
    choices = [Choice(k, v, reasons.get(k, "as the run began")) for k, v in values.items()]
    return _with_choices(prepared, choices)


def choose_micro_batch(prepared: Prepared) -> tuple[Prepared, tuple[Choice, ...]]:
    """Return the recipe with a number as `train.micro_batch`, and the choices made.

    It is planned for the largest batches that the recipe allows, because the rows are packed for a
    micro-batch.
    """
    recipe = prepared.recipe
    if recipe.train.micro_batch != "auto":
        return prepared, ()
    has_copy = prepared.has_packed_copy
    planner = Planner(prepared.config, prepared.profile, has_copy=has_copy)
    settled = planner.settle(recipe)
    choices = tuple(c for c in settled.choices if c.key not in _KEYS)
    return _with_choices(prepared, choices), choices


def choose_policy(job: TrainingJob) -> tuple[TrainingJob, MemoryPlan, tuple[Choice, ...]]:
    """Return the job without `auto` settings, its plan and the choices made."""
    prepared = job.prepared
    batches = Batches(job.largest_step_batches, job.largest_eval_batches)
    given = (prepared.config, prepared.profile, lambda _: batches)
    planner = Planner(*given, has_copy=prepared.has_packed_copy)
    settled = planner.settle(prepared.recipe)
    prepared = _with_choices(prepared, settled.choices)
    return replace(job, prepared=prepared), settled.plan, settled.choices


def may_recompute_more(prepared: Prepared) -> bool:
    """Return whether the policy was chosen and not set, so that a shortage may change it."""
    return any(choice.key == activations.KEY for choice in prepared.choices)


def _with_choices(prepared: Prepared, choices: Iterable[Choice]) -> Prepared:
    """Return the recipe with the chosen values."""
    chosen = tuple(choices)
    recipe = with_values(prepared.recipe, {choice.key: choice.value for choice in chosen})
    return replace(prepared, recipe=recipe, choices=(*prepared.choices, *chosen))
