"""The floating-point operations of a planned step, and those that recomputation adds."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_cli.memory.ledger import STEP_PHASES
from qlora_cli.plan.recording import BlockSegment


@dataclass(frozen=True)
class StepFlops:
    """Operations of matrix products and attention of the micro-batches of a recorded step.

    total: of the step. recomputed: those that are done a second time. block: what recomputing one
    group of blocks costs; if none is recomputed, its forward pass, which is a little more.
    micro_batches: of the recorded step.
    """

    total: int = 0
    recomputed: int = 0
    block: int = 0
    micro_batches: int = 1

    @property
    def recomputed_share(self) -> float:
        """Recomputed operations divided by those of the step without recomputation."""
        return self.recomputed / max(1, self.total - self.recomputed)

    @property
    def block_share(self) -> float:
        """Operations that recomputing one more group costs, by those without recomputation."""
        return self.block / max(1, self.total - self.recomputed)


def step_flops(segments: Iterable[BlockSegment], middle: int) -> StepFlops:
    """Return the operations of the last step of a recording.

    middle: number of a group of blocks that is like most others.
    """
    forward: Tally[int | None] = Tally()
    again: Tally[int | None] = Tally()
    total, part, micro_batches = 0, "", 0
    last: StepFlops | None = None
    for segment in segments:
        for kind, _, _, category, flops in segment.events:
            if kind == "begin":
                total, part, micro_batches = 0, "", 0
                forward.clear()
                again.clear()
            elif kind == "mark":
                part = category
                micro_batches += part == "forward"
            elif kind in ("work", "recompute"):
                total += flops
                if kind == "recompute":
                    again[segment.block] += flops
                elif part == "forward":
                    forward[segment.block] += flops
            elif kind == "end" and category in STEP_PHASES:
                # The first blocks are recomputed before others are.
                block = again[middle] or again[middle // 2] or again[0] or forward[middle]
                last = StepFlops(total, again.total(), block, max(1, micro_batches))
    if last is None:
        raise ValueError("the recording has no step")
    return last
