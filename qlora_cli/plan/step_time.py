"""Estimates the time of training from the work that a dry run recorded and the device's speeds.

Each operation takes as long as the slowest of three things: its floating-point operations, the
bytes that it moves, and the time of a call. Operations do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from qlora_cli.memory.ledger import STEP_PHASES
from qlora_cli.memory.work import Work, WorkKind
from qlora_cli.plan.recording import BlockSegment

_PASSES = ("forward", "loss", "backward")
"""Parts of a step that are work of a micro-batch."""


@dataclass(frozen=True)
class DeviceSpeed:
    """What a device does per second. source: of the figures.

    flops_per_second: of matrix products in the compute dtype. bytes_per_second: read and written,
    by the kind of work; `other` is the value of kinds that are not named. call_seconds: least time
    of an operation. link_bytes_per_second: of copies from host memory to the device, without the
    time to read a disk. link_source: of this figure.
    """

    flops_per_second: float
    bytes_per_second: Mapping[WorkKind, float]
    call_seconds: float
    source: str
    link_bytes_per_second: float
    link_source: str

    def seconds(self, work: Iterable[Work]) -> float:
        """Return the time of all operations together."""
        return sum(map(self._seconds_of_one, work))

    def parts(self, work: Iterable[Work]) -> tuple[float, float, float]:
        """Return the time that is fixed, grows with the tokens, and with their square.

        Fixed are the calls and what is done to the weights, which are dequantized for each pass.
        """
        fixed = tokens = pairs = 0.0
        for item in work:
            seconds = self._seconds_of_one(item)
            own = seconds if item.kind == "dequantize" else self.call_seconds
            fixed += own
            if item.kind == "attention":
                pairs += seconds - own
            else:
                tokens += seconds - own
        return fixed, tokens, pairs

    def _seconds_of_one(self, work: Work) -> float:
        speed = self.bytes_per_second.get(work.kind, self.bytes_per_second["other"])
        return max(work.flops / self.flops_per_second, work.num_bytes / speed, self.call_seconds)


class PartOfBatch(NamedTuple):
    """Work of a micro-batch that belongs together. part: forward, loss or backward."""

    part: str
    block: int | None
    work: list[Work]


def micro_batches(segments: Iterable[BlockSegment]) -> list[list[PartOfBatch]]:
    """Return the work of the micro-batches of the last step of a recorded dry run.

    It is that of the forward and backward pass: of the largest micro-batch, or of the largest first
    and the largest later one.
    """
    found: list[list[PartOfBatch]] = []
    step: list[list[PartOfBatch]] = []
    part = ""
    for segment in segments:
        for event in segment.events:
            if event.kind == "begin":
                found, part = [], ""
            elif event.kind == "mark":
                part = event.category
                found += [[]] if part == "forward" else []
            # An evaluation has a loss and no training step.
            elif event.kind in ("work", "recompute") and found and part in _PASSES:
                last = found[-1][-1] if found[-1] else None
                if last is None or (last.part, last.block) != (part, segment.block):
                    last = PartOfBatch(part, segment.block, [])
                    found[-1].append(last)
                kind = cast(WorkKind, event.category)
                last.work.append(Work(kind, event.flops, event.num_bytes))
            elif event.kind == "end" and event.category in STEP_PHASES:
                step = found
    if not step:
        raise ValueError("the recording has no step")
    return step


def work_of(parts: Iterable[PartOfBatch]) -> list[Work]:
    """Return the work of all parts of a micro-batch."""
    return [item for part in parts for item in part.work]


def update_work(trained_parameters: int) -> Work:
    """Return the work of one update by Adam.

    Parameter, gradient and two states are read, all but the gradient are written, in float32. This
    is a formula, because the operations on lists of tensors are not recorded by block.
    """
    return Work("other", 0, 7 * 4 * trained_parameters)
