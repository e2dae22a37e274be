"""Notes of a plan: which figures are modelled or bounds, and what cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.device import DeviceProfile
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.bitsandbytes_adamw import PAGED_FROM
from qlora_cli.train.optimizer import OPTIMIZERS
from qlora_cli.units import format_bytes


def plan_notes(recipe: Recipe, profile: DeviceProfile, plan: MemoryPlan) -> tuple[str, ...]:
    """Return the notes of a resolved recipe's plan for a device, one sentence each."""
    return (
        *_processes_note(recipe, profile, plan),
        *_weights_note(profile, plan),
        *_gpu_notes(recipe, profile),
        *_recipe_notes(recipe),
    )


def _processes_note(recipe: Recipe, profile: DeviceProfile, plan: MemoryPlan) -> Iterator[str]:
    if profile.count == 1:
        return
    number, step = profile.count, recipe.train.grad_accum
    base = "the complete base"
    if recipe.base.residency == SHARD:
        weights = format_bytes(plan.streamed_bytes)
        base = f"1/{number} of {weights} of weights and of the adapter of their blocks"
    yield (
        f"the figures are those of each of {number} devices. Each has a process with {base}, "
        f"1/{number} of the optimizer states, and up to {-(-step // number)} of the {step} "
        "micro-batches of a step"
    )
    exchanged = f"gradients and updates of {format_bytes(plan.adapter_bytes)} once per step"
    if recipe.base.residency == SHARD:
        received = 2 * plan.streamed_bytes * (number - 1) // number
        exchanged = f"per micro-batch {format_bytes(received)} of weights that each receives, with "
        exchanged += "the adapter and the gradients of their blocks"
    yield f"the devices exchange {exchanged}; the estimated duration does not contain it"


def _weights_note(profile: DeviceProfile, plan: MemoryPlan) -> Iterator[str]:
    if plan.frozen_bytes > profile.usable_bytes:
        yield (
            f"the frozen weights alone need {format_bytes(plan.frozen_bytes)} of "
            f"{format_bytes(profile.usable_bytes)}: no change of the batch, the adapter or the "
            "optimizer makes this job fit; use base.residency=host, a smaller base, fewer bits "
            "or a larger GPU"
        )


def _gpu_notes(recipe: Recipe, profile: DeviceProfile) -> Iterator[str]:
    if profile.kind != "cuda":
        return
    yield (
        "allocated and reserved are modelled: torch's caching allocator, cuBLAS' workspaces "
        "and the attention kernel of compute capability "
        + ".".join(map(str, profile.capability or ()))
    )
    source = "assumed" if profile.is_planned else "measured"
    yield (
        f"the CUDA context and other processes use {format_bytes(profile.context_bytes)} of the "
        f"GPU's memory ({source}); the rest is available to the allocator"
    )
    if recipe.data.packing:
        yield (
            "each packed sequence is planned as one row; attention needs a little more memory for "
            "many short rows, and `qlora train` plans again with the lengths of the data's rows"
        )


def _recipe_notes(recipe: Recipe) -> Iterator[str]:
    if OPTIMIZERS[recipe.train.optimizer].is_paged:
        yield (
            f"optimizer states of {PAGED_FROM:,} values and more are not counted: they are in "
            "paged memory, and the driver moves them to the CPU when the GPU needs the space"
        )
    if recipe.base.bits == 8 and recipe.base.outlier_threshold:
        yield (
            "8 bit: the number of outlier columns depends on the data; the plan assumes the "
            "largest number that is multiplied in 16 bit, an eighth of a layer's inputs"
        )
