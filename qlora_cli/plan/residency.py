"""Where the base of a job can be that does not fit the device, and the reason that is shown."""

from __future__ import annotations

from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.resolve import RESIDENCY, Choice
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import format_bytes


def other_residencies(recipe: Recipe, num_devices: int) -> list[str]:
    """Return the residencies of a base that does not fit the device, the fastest first."""
    if recipe.adapter.method != "lora":
        return []
    is_recomputed = recipe.train.activation_checkpointing not in (False, 0)
    return [SHARD, "host"] if num_devices > 1 and is_recomputed else ["host"]


def moved_choice(residency: str, num_devices: int, plan: MemoryPlan, what: str) -> Choice:
    """Return the choice of another residency. what: the memory that a base on the device needs."""
    reason = f"a base on the device does not fit: {what}. "
    if residency == SHARD:
        reason += f"Each of {num_devices} devices has a part of {plan.num_recomputed} of "
        reason += f"{plan.num_blocks} blocks: {format_bytes(plan.needed_bytes)} planned"
        return Choice(RESIDENCY, residency, reason)
    reason += "The embedding, the head and "
    reason += f"{plan.num_recomputed} of {plan.num_blocks} blocks are in host memory, and "
    reason += (
        f"{format_bytes(plan.streamed_bytes + plan.head_bytes)} of them are copied to the GPU "
    )
    reason += "to compute: "
    reason += f"{format_bytes(plan.needed_bytes)} planned"
    return Choice(RESIDENCY, residency, reason)
