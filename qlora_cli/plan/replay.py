"""Replays the recording of a dry run to the memory model of the target device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.memory.allocator import OutOfMemory
from qlora_cli.memory.ledger import PHASE_ORDER, Phase, last_step, peak_phase
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.plan.flops import StepFlops, step_flops
from qlora_cli.plan.loss_peak import LossPeak, PartListener
from qlora_cli.plan.recording import BlockSegment, play
from qlora_cli.plan.repeat import repeat

_FROZEN = ("base", "quant_constants", "embeddings", "head")
_PERMANENT = (*_FROZEN, "adapter", "gradients", "optimizer")
"""Categories that live during the complete step."""


@dataclass(frozen=True)
class MemoryPlan:
    """The result of a dry run. All sizes are in bytes.

    adapter_bytes: trained tensors as a checkpoint stores them. reserved_bytes: peak of the memory
    that the caching allocator takes from the GPU; None on a CPU. floor_bytes: lower bound of the
    job's memory: weights, adapter state, the inputs of all blocks and one block's working set.
    segments: all events of the job. memory_model: the model of the target device. loss: the peak of
    the loss in a step, beside the peak of the rest. flops: operations of a step. num_blocks,
    num_recomputed: number of blocks, and of those that are recomputed in the backward pass.
    streamed_bytes: packed weights that are not on the device, and that each pass copies to it.
    head_bytes: the same of the head, which each micro-batch copies once. num_tokens: of the largest
    micro-batch. moved_inputs: bytes of inputs of recomputed blocks that this micro-batch copies to
    host memory and back. input_bytes: of the input of one block.
    """

    phases: tuple[Phase, ...]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    reserved_bytes: int | None
    floor_bytes: int
    segments: Sequence[BlockSegment]
    memory_model: MemoryModel
    loss: LossPeak
    flops: StepFlops
    num_blocks: int = 0
    num_recomputed: int = 0
    streamed_bytes: int = 0
    head_bytes: int = 0
    num_tokens: int = 0
    moved_inputs: int = 0
    input_bytes: int = 0

    @property
    def copied_weights(self) -> int:
        """Bytes of weights that a micro-batch copies to the device, at most."""
        return 2 * self.streamed_bytes + self.head_bytes

    @property
    def copied_bytes(self) -> int:
        """Bytes that a micro-batch copies between host memory and the device, at most."""
        return self.copied_weights + self.moved_inputs

    @property
    def needed_bytes(self) -> int:
        """Memory that the caching allocator reserves on a GPU, or of the tensors on a CPU."""
        return self.peak_bytes if self.reserved_bytes is None else self.reserved_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the job."""
        return peak_phase(self.phases).peak_bytes

    @property
    def frozen_bytes(self) -> int:
        """Memory of the frozen weights, which no change of batch, adapter or optimizer reduces."""
        step = last_step(self.phases)
        return sum(step.at_peak.get(category, 0) for category in _FROZEN)

    def fits(self, capacity_bytes: int) -> bool:
        """Return whether the job finishes on the device if it can use `capacity_bytes`.

        On a GPU the events are replayed to the model of the caching allocator with this limit. The
        allocator returns its unused segments before it fails. It fails although enough memory is
        free if no free block is large enough.
        """
        if self.reserved_bytes is None:
            return self.peak_bytes <= capacity_bytes
        if self.reserved_bytes <= capacity_bytes:
            return True
        try:
            play(self.segments, self.memory_model.new_counter(capacity_bytes))
        except OutOfMemory:
            return False
        return True


@dataclass(frozen=True)
class RecordedJob:
    """The recording of a dry run with `num_blocks` blocks.

    total, trained, trained_bytes: (sum over all parameters, sum over one middle block), the first
    two in parameters. input_bytes: size of one block's input, which activation checkpointing keeps.
    has_single_blocks: False if a block stands for a group of blocks; then one block's working set
    is not known, and the lower bound of the memory leaves it out. streamed_bytes: packed weights of
    each recorded block that are not on the device. head_bytes: the same of the head. num_tokens: of
    the largest micro-batch.
    """

    segments: list[BlockSegment]
    num_blocks: int
    memory_model: MemoryModel
    total: tuple[int, int]
    trained: tuple[int, int]
    trained_bytes: tuple[int, int]
    input_bytes: int
    has_single_blocks: bool
    streamed_bytes: Sequence[int]
    head_bytes: int = 0
    num_tokens: int = 0


def replay(job: RecordedJob, repeats: Sequence[tuple[int, int]]) -> MemoryPlan:
    """Return the plan of the job with more blocks than were recorded.

    repeats: (number of a recorded block, number of copies that are added after it). Raises NotAlike
    if the recording cannot be extended in this way.
    """
    segments = job.segments
    for repeated, num_copies in repeats:
        segments = repeat(segments, repeated, num_copies)
    num_added = sum(num_copies for _, num_copies in repeats)
    num_blocks = job.num_blocks + num_added
    counter = job.memory_model.new_counter()
    working_set_bytes, start_bytes = 0, 0

    def measure_working_set(segment: BlockSegment) -> None:
        """Update the working set of the middle block; `counter.phases` is empty while loading."""
        nonlocal working_set_bytes, start_bytes
        if segment.block == num_blocks // 2 and counter.phases and job.has_single_blocks:
            working_set_bytes = max(working_set_bytes, counter.high_bytes - start_bytes)
        start_bytes = counter.high_bytes = counter.live_bytes

    listener = PartListener(counter)
    play(segments, listener, measure_working_set)
    step = last_step(counter.phases)
    permanent_bytes = sum(step.at_peak.get(category, 0) for category in _PERMANENT)
    return MemoryPlan(
        phases=tuple(sorted(counter.phases, key=lambda phase: PHASE_ORDER.index(phase.name))),
        trainable_parameters=job.trained[0] + num_added * job.trained[1],
        total_parameters=job.total[0] + num_added * job.total[1],
        adapter_bytes=job.trained_bytes[0] + num_added * job.trained_bytes[1],
        reserved_bytes=counter.allocator.peak_reserved_bytes if counter.allocator else None,
        floor_bytes=permanent_bytes + working_set_bytes + job.input_bytes * num_blocks,
        segments=segments,
        memory_model=job.memory_model,
        loss=listener.peak,
        flops=step_flops(segments, num_blocks // 2),
        num_tokens=job.num_tokens,
        streamed_bytes=sum(job.streamed_bytes)
        + sum(num_copies * job.streamed_bytes[block] for block, num_copies in repeats),
        head_bytes=job.head_bytes,
    )
