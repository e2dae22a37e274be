"""Estimates what copies of a streamed base cost: the bytes of a step and the time that they take.

While a block computes, the next one is copied, so a block takes as long as the slower of the two.
The head is copied once, during the loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from qlora_cli.plan.loss_peak import LOSS
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.step_time import DeviceSpeed, PartOfBatch


def overlapped_seconds(
    parts: Sequence[PartOfBatch], plan: MemoryPlan, speed: DeviceSpeed, bytes_per_second: float
) -> float:
    """Return the time of a micro-batch whose copies overlap with its computation.

    parts: of `micro_batches`, of this plan. bytes_per_second: of the link.
    """
    seconds: dict[tuple[str, int | None], float] = defaultdict(float)
    for name, block, work in parts:
        seconds[name, block] += speed.seconds(work)
    groups = sorted({index for _, index in seconds if index is not None})
    num_streamed = round(len(groups) * plan.num_recomputed / max(1, plan.num_blocks))
    of_group = plan.streamed_bytes / max(1, num_streamed) / bytes_per_second
    of_head = plan.head_bytes / bytes_per_second
    streamed = set(groups[:num_streamed]) if plan.streamed_bytes else set()
    total = 0.0
    for (part, block), computing in seconds.items():
        copying = of_head if (part, block) == (LOSS, None) else 0.0
        total += max(computing, of_group if block in streamed else copying)
    return total
