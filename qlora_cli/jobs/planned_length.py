"""How long a planned job is: its updates and tokens, from the rows, and its estimated time."""

from __future__ import annotations

from typing import Any

import torch

from qlora_cli.data.packing import pack
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import QloraError
from qlora_cli.jobs.data_survey import row_loader, survey
from qlora_cli.jobs.device_speed import device_speed
from qlora_cli.jobs.measured_speed import measured_speed
from qlora_cli.jobs.training_length import TrainingLength
from qlora_cli.plan.link_time import overlapped_seconds
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.results import LinkTime, TimeEstimate
from qlora_cli.plan.step_time import micro_batches, update_work, work_of
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import format_figure

_UNKNOWN_GPU = "not estimated: --vram with the name of a GPU, such as RTX 4090, gives its speed"


def planned_length(recipe: Recipe) -> tuple[TrainingLength | None, str | None]:
    """Return (length, None), or (None, problem) if the rows or the tokenizer cannot be read.

    Many rows are not all encoded: the length is then that of a random sample, by proportion.
    """
    try:
        loader = row_loader(recipe)
        if loader.tokenizer is None:
            return None, "the base has no tokenizer here"
        found = survey(recipe, loader.tokenizer, loader.limits)
    except QloraError as error:
        return None, str(error).splitlines()[0]
    lengths = found.lengths
    sequences = len(pack(list(lengths), recipe.data.seq_len)) if recipe.data.packing else None
    length = TrainingLength.of_totals(
        recipe,
        rows=found.of_all(len(lengths)),
        sequences=found.of_all(len(lengths) if sequences is None else sequences),
        tokens=found.of_all(sum(lengths)),
        trained_tokens=found.of_all(sum(found.targets)),
        is_estimate=found.is_sample,
    )
    return length, None


def estimated_time(
    recipe: Recipe,
    config: Any,
    profile: DeviceProfile,
    plan: MemoryPlan,
    length: TrainingLength | None,
) -> TimeEstimate:
    """Return the time of training without evaluations.

    It is computed from the speed of an earlier run of the same kind on this device; without one,
    from the work of the planned step and the speed of the device. recipe: without `auto` values.
    config: transformers' config of the base. plan: of the recipe. length: of the job; without it
    the time of all steps is known only if the recipe sets their number.
    """
    train = recipe.train
    if (run := measured_speed(recipe, config, profile)) and length:
        total = length.tokens * length.epochs / run.tokens_per_second
        return TimeEstimate(total / length.updates, total, run.source)
    speed = device_speed(profile, getattr(torch, recipe.base.compute_dtype))
    if speed is None:
        return TimeEstimate(source=_UNKNOWN_GPU)
    parts = micro_batches(plan.segments)[-1]
    work = work_of(parts)
    micro_batch = speed.seconds(work)
    update = speed.seconds([update_work(plan.trainable_parameters)])
    own, copies = -(-train.grad_accum // profile.count), None
    if plan.copied_bytes and recipe.base.residency != SHARD:
        link, overlapped = speed.link_bytes_per_second, overlapped_seconds(parts, plan, speed)
        copies = LinkTime(
            contents=_copied_contents(plan),
            bytes_per_step=plan.copied_bytes * own,
            bytes_per_second=link,
            copy_seconds=plan.copied_bytes * own / link,
            compute_seconds=micro_batch * own + update,
            step_seconds=overlapped * own + update,
            source=speed.link_source,
        )
        micro_batch = overlapped
    tera_flops = sum(item.flops for item in work) / 1e12
    gigabytes = sum(item.num_bytes for item in work) / 1e9
    source = (
        f"{speed.source}; a micro-batch computes {format_figure(tera_flops)} TFLOP and moves "
        f"{format_figure(gigabytes)} GB"
    )
    if length is None:
        step = micro_batch * own + update
        all_steps = step * train.steps if train.steps else None
        return TimeEstimate(step, all_steps, source, copies)
    share = length.tokens * length.epochs / (recipe.data.seq_len * train.pass_size)
    total = share * own / train.grad_accum * micro_batch + length.updates * update
    return TimeEstimate(total / length.updates, total, source, copies)


def _copied_contents(plan: MemoryPlan) -> str:
    """Return what a micro-batch copies between host memory and the device, and the direction."""
    if not plan.moved_inputs:
        return "weights to the device"
    weights = "weights to the device and " if plan.copied_weights else ""
    return f"{weights}inputs of blocks to host memory and back"
