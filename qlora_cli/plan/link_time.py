"""Estimates the time of a micro-batch whose copies between host memory and device take time.

While a block computes, the next one is copied, so a block takes as long as the slower of the two.
The head is copied once, during the loss. Inputs of blocks are copied at any time of the
micro-batch, so it takes at least as long as all copies together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from qlora_cli.plan.loss_peak import LOSS
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.step_time import DeviceSpeed, PartOfBatch


def overlapped_seconds(parts: Sequence[PartOfBatch], plan: MemoryPlan, speed: DeviceSpeed) -> float:
    """Return the time of a micro-batch whose copies overlap with its computation.

    parts: of `micro_batches`, of this plan.
    """
    seconds: dict[tuple[str, int | None], float] = defaultdict(float)
    for name, block, work in parts:
        seconds[name, block] += speed.seconds(work)
    link = speed.link_bytes_per_second
    groups = sorted({index for _, index in seconds if index is not None})
    num_streamed = round(len(groups) * plan.num_recomputed / max(1, plan.num_blocks))
    of_group = plan.streamed_bytes / max(1, num_streamed) / link
    of_head = plan.head_bytes / link
    streamed = set(groups[:num_streamed]) if plan.streamed_bytes else set()
    total = 0.0
    for (part, block), computing in seconds.items():
        # The events of the loss follow those of the last block and have its number.
        copying = of_head if part == LOSS else of_group if block in streamed else 0.0
        total += max(computing, copying)
    return max(total, plan.copied_bytes / link)
