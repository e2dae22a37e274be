"""What comes of an imagined job: its recording drawn out, and played to an account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.memory.allocator import OutOfMemory
from qlora_cli.memory.ledger import Phase, worst
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.plan.recording import BlockSegment, play, repeat

_FROZEN = ("base", "quant_constants", "embeddings", "head")
_STANDING = (*_FROZEN, "adapter", "gradients", "optimizer")


@dataclass(frozen=True)
class MemoryPlan:
    """What a plan found, in bytes.

    adapter_bytes: of the trained tensors, as a checkpoint holds them. reserved_bytes: the most that
    the caching allocator takes from the card; None on a CPU. floor_bytes: what no schedule can do
    without: weights, adapter state, the blocks' inputs and one block's working set.
    """

    phases: tuple[Phase, ...]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    reserved_bytes: int | None
    floor_bytes: int
    visits: Sequence[BlockSegment]
    memory_model: MemoryModel

    @property
    def peak_bytes(self) -> int:
        """The worst instant of the job."""
        return worst(self.phases).peak_bytes

    @property
    def frozen_bytes(self) -> int:
        """The weights that are not trained: no batch, adapter or optimizer needs fewer."""
        step = next(phase for phase in self.phases if phase.name == "step")
        return sum(step.at_peak.get(category, 0) for category in _FROZEN)

    def fits(self, capacity_bytes: int) -> bool:
        """Whether the job ends on a device that has so much for it.

        On a card the allocator decides: it gives back what it holds unused before it fails, and it
        fails although enough is free, where that lies in pieces.
        """
        if self.reserved_bytes is None:
            return self.peak_bytes <= capacity_bytes
        if self.reserved_bytes <= capacity_bytes:
            return True
        try:
            play(self.visits, self.memory_model.new_counter(capacity_bytes))
        except OutOfMemory:
            return False
        return True


@dataclass(frozen=True)
class Recorded:
    """One imagined model.

    total, trained, trained_bytes: (of all, of one block in the middle). input_bytes: of one block's
    input, which checkpointing keeps.
    """

    visits: list[BlockSegment]
    num_blocks: int
    memory_model: MemoryModel
    total: tuple[int, int]
    trained: tuple[int, int]
    trained_bytes: tuple[int, int]
    input_bytes: int


def account(recorded: Recorded, num_blocks: int) -> MemoryPlan:
    """Plays the recording. Raises NotAlike where it cannot be drawn out to `num_blocks`."""
    more = num_blocks - recorded.num_blocks
    visits = repeat(recorded.visits, num_blocks) if more else recorded.visits
    counter = recorded.memory_model.new_counter()
    working_bytes, start = 0, 0

    def after(visit: BlockSegment) -> None:
        nonlocal working_bytes, start
        if visit.block == num_blocks // 2 and counter.phases:  # Loading is behind us.
            working_bytes = max(working_bytes, counter.high_bytes - start)
        start = counter.high_bytes = counter.live_bytes

    play(visits, counter, after)
    step = next(phase for phase in counter.phases if phase.name == "step")
    standing = sum(step.at_peak.get(category, 0) for category in _STANDING)
    return MemoryPlan(
        phases=counter.phases,
        trainable_parameters=recorded.trained[0] + more * recorded.trained[1],
        total_parameters=recorded.total[0] + more * recorded.total[1],
        adapter_bytes=recorded.trained_bytes[0] + more * recorded.trained_bytes[1],
        reserved_bytes=counter.allocator.peak_reserved_bytes if counter.allocator else None,
        floor_bytes=standing + working_bytes + recorded.input_bytes * num_blocks,
        visits=visits,
        memory_model=recorded.memory_model,
    )
