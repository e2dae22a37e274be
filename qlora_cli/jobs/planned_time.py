"""The planned time of the steps of a training job, which measured steps correct."""

from __future__ import annotations

import torch

from qlora_cli.adapters.registry import method_of
from qlora_cli.data.packing import peak_steps
from qlora_cli.jobs.device_speed import known_speed
from qlora_cli.jobs.measured_speed import measured_speed
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.speeds import assumed_speed
from qlora_cli.plan.step_time import micro_batches, update_work, work_of
from qlora_cli.train.step_time_fit import PlannedTime
from qlora_cli.train.time_left import Interruptions, TimeLeft, WorkLeft

TRACKED_STEPS = 3
"""Steps at the start of a process that the memory tracker records: the first one creates the
optimizer states, two more show the steady state."""
_TRACKER_SECONDS = 80e-6
"""Time that the memory tracker adds to an operation, on a CPU core of an AMD EPYC."""


def time_left(job: TrainingJob, plan: MemoryPlan | None, first: int, parts: int) -> TimeLeft:
    """Return the estimate of the time of a job before the first step of a process.

    plan: of the job; None in a process that shows no progress. first: number of steps that earlier
    processes did. parts: number of parts that each micro-batch is divided into.
    """
    tracked = peak_steps(job.schedule, range(first, job.steps))
    tracked |= {*range(first, first + TRACKED_STEPS)}
    train = job.prepared.recipe.train
    between = Interruptions(
        steps=job.steps,
        eval_batches=tuple(batch.size for batch in job.held_out),
        eval_every=job.eval_every,
        checkpoint_every=train.checkpoint_every,
        keeps_best=train.keep_best is not False,
        checkpoint_bytes=3 * plan.adapter_bytes if plan else 0,
    )
    work = WorkLeft(job.schedule, job.steps, tracked)
    planned = planned_time(job, plan) if plan else PlannedTime()
    return TimeLeft(work, planned, between, parts)


def planned_time(job: TrainingJob, plan: MemoryPlan) -> PlannedTime:
    """Return the planned time of the parts of a step, from the work of the planned micro-batch.

    plan: of the job. Without a known speed of the device only the ratios are of use.
    """
    prepared = job.prepared
    recipe, profile = prepared.recipe, prepared.profile
    known = known_speed(profile, getattr(torch, recipe.base.compute_dtype))
    speed = known or assumed_speed(profile)
    work, size = work_of(micro_batches(plan.segments)[-1]), job.largest_step_batches[-1].size
    fixed, tokens, pairs = speed.parts(work)
    trains_base = not method_of(recipe.adapter).freezes_base
    planned = PlannedTime(
        update=speed.seconds([update_work(plan.trainable_parameters)]),
        micro_batch=fixed,
        token=tokens / size.tokens,
        pair=pairs / (size.tokens * size.longest),
        tracker=len(work) * _TRACKER_SECONDS,
        # The backward pass costs one more forward pass for the gradients of the activations and
        # another one for those of the weights, and recomputed blocks run theirs again.
        forward_share=1 / (2 + trains_base + plan.num_recomputed / max(1, plan.num_blocks)),
        source=known.source if known else "",
    )
    run = measured_speed(recipe, prepared.config, profile)
    if run is None:
        return planned
    total = WorkLeft(job.schedule, job.steps, ()).after(0)
    factor = total.tokens / run.tokens_per_second / float(planned.parts(total).sum())
    return planned.scaled(factor, run.source, is_measured=True)
