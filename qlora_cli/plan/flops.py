"""The floating-point operations of a planned step, and those that recomputation adds."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_cli.plan.recording import BlockSegment


@dataclass(frozen=True)
class StepFlops:
    """Operations of matrix products and attention of the micro-batches of a recorded step.

    total: of the step. recomputed: of the forward passes that are done twice. block: of the forward
    pass of one group of blocks, which recomputing it costs.
    """

    total: int = 0
    recomputed: int = 0
    block: int = 0

    @property
    def recomputed_share(self) -> float:
        """Recomputed operations divided by those of the step without recomputation."""
        return self.recomputed / max(1, self.total - self.recomputed)

    @property
    def block_share(self) -> float:
        """Operations that recomputing one more group costs, by those without recomputation."""
        return self.block / max(1, self.total - self.recomputed)


def step_flops(segments: Iterable[BlockSegment], num_recomputed: int, middle: int) -> StepFlops:
    """Return the operations of the phase `step` of a recording.

    num_recomputed: number of first groups of blocks that are recomputed. middle: number of a group
    that is like most others.
    """
    forward: Tally[int | None] = Tally()
    total, part = 0, ""
    for segment in segments:
        for kind, _, _, category, flops in segment.events:
            if kind == "begin":
                total, part = 0, ""
                forward.clear()
            elif kind == "mark":
                part = category
            elif kind == "work":
                total += flops
                if part == "forward":
                    forward[segment.block] += flops
            elif kind == "end" and category == "step":
                recomputed = sum(forward[group] for group in range(num_recomputed))
                return StepFlops(total, recomputed, forward[middle])
    raise ValueError("the recording has no step")
