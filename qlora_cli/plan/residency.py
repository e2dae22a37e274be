"""Where the base of a job can be that does not fit the device, and the reason that is shown."""

from __future__ import annotations

from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.resolve import RESIDENCY, Choice
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import format_bytes


def other_residencies(recipe: Recipe, num_devices: int) -> list[str]:
    """Return the values of `base.residency` to try for a base that does not fit the device.

    The fastest one is first. num_devices: of the job, with a process each.
    """
    if recipe.adapter.method != "lora":
        return []
    is_recomputed = recipe.train.activation_checkpointing not in (False, 0)
    can_share = num_devices > 1 and is_recomputed and recipe.adapter.may_be_sharded
    return [SHARD, "host"] if can_share else ["host"]


def moved_choice(residency: str, num_devices: int, plan: MemoryPlan, what: str) -> Choice:
    """Return the choice of another residency than `device`, with its reason.

    plan: with this residency. what: the memory that the job needs with the base on the device.
    """
    reason = f"a base on the device does not fit: {what}. "
    if residency == SHARD:
        reason += f"Each of {num_devices} devices has a part of {plan.num_recomputed} of "
        reason += f"{plan.num_blocks} blocks: {format_bytes(plan.needed_bytes)} planned"
        return Choice(RESIDENCY, residency, reason)
    copied = format_bytes(plan.streamed_bytes + plan.head_bytes)
    reason += f"The embedding, the head and {plan.num_recomputed} of {plan.num_blocks} blocks are "
    reason += f"in host memory, and {copied} of them are copied to the GPU to compute: "
    reason += f"{format_bytes(plan.needed_bytes)} planned"
    return Choice(RESIDENCY, residency, reason)
