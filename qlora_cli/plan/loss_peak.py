"""Finds out whether the loss decides the peak memory of a training step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from qlora_cli.memory.counter import Counter
from qlora_cli.memory.ledger import STEP_PHASES
from qlora_cli.memory.work import Work

LOSS = "loss"
"""The part of a step that `nn/loss.py` marks: from the first logits to the backward pass."""


@dataclass(frozen=True)
class LossPeak:
    """Peaks of the training steps in bytes.

    loss_bytes: while the loss is computed. end_bytes: what still lived at the end of that part.
    rest_bytes: outside of it.
    """

    loss_bytes: int = 0
    end_bytes: int = 0
    rest_bytes: int = 0

    @property
    def decides(self) -> bool:
        """Whether the loss needs more memory than everything else."""
        return self.loss_bytes > self.rest_bytes

    def chunk_below_rest(self, chunk: int) -> int:
        """Return the largest number of tokens with which the loss stays below the rest.

        chunk: number of tokens of the loss that was measured. What lives only during the loss is
        proportional to it.
        """
        transient = self.loss_bytes - self.end_bytes
        return chunk * max(0, self.rest_bytes - self.end_bytes) // max(1, transient)


class PartListener:
    """A `MemoryListener` that passes every event on to `counter` and keeps the peak of the loss."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.peak = LossPeak()
        self._part = ""
        self._part_bytes = 0
        self._parts: list[tuple[str, int, int]] = []

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        """Count a new storage."""
        self.counter.allocate(key, num_bytes, category, origin)
        if self.counter.live_bytes > self._part_bytes:
            self._part_bytes = self.counter.live_bytes

    def free(self, key: Hashable) -> None:
        """Remove a storage."""
        self.counter.free(key)

    def recategorize(self, key: Hashable, category: str) -> None:
        """Count the storage under `category` from now on."""
        self.counter.recategorize(key, category)

    def begin_phase(self) -> None:
        """Start a phase."""
        self.counter.begin_phase()
        self._parts.clear()
        self._begin("")

    def end_phase(self, name: str) -> None:
        """End the phase. If it is a training step, its parts count."""
        self.counter.end_phase(name)
        self._end()
        if name in STEP_PHASES:
            for part, peak_bytes, end_bytes in self._parts:
                self._add(part, peak_bytes, end_bytes)

    def mark(self, name: str) -> None:
        """Start a part of a step."""
        self.counter.mark(name)
        self._end()
        self._begin(name)

    def work(self, work: Work) -> None:
        """Do nothing; only memory is counted."""

    def enter_module(self, path: str) -> None:
        """Do nothing; the parts are not those of modules."""

    def release_cache(self) -> None:
        """Return the allocator model's unused segments to the device."""
        self.counter.release_cache()

    def _begin(self, part: str) -> None:
        self._part, self._part_bytes = part, self.counter.live_bytes

    def _end(self) -> None:
        self._parts.append((self._part, self._part_bytes, self.counter.live_bytes))

    def _add(self, part: str, peak_bytes: int, end_bytes: int) -> None:
        known = self.peak
        if part != LOSS:
            rest = max(known.rest_bytes, peak_bytes)
            self.peak = LossPeak(known.loss_bytes, known.end_bytes, rest)
        elif peak_bytes > known.loss_bytes:
            self.peak = LossPeak(peak_bytes, end_bytes, known.rest_bytes)
