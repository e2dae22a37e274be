"""The tracker and the device's own counter side by side, phase by phase.

The tracker knows categories, the allocator knows the truth. A phase's peak on CUDA is the
allocator's; what the tracker did not see of it is `other`. On a CPU there is no such counter, and
the tracker's figure stands alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qlora_cli.memory.allocator import CachingAllocator
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.cpu_rules import CPU_RULES
from qlora_cli.memory.cuda_rules import rules_for
from qlora_cli.memory.device import inspect_device, read_allocator, reset_peak
from qlora_cli.memory.ledger import Allocator, Phase
from qlora_cli.memory.timeline import Timeline
from qlora_cli.memory.tracker import StorageTracker


class Instrument:
    """Measures the phases of a real job on one device."""

    def __init__(self, device: torch.device) -> None:
        self.timeline = Timeline()
        on_card = device.type == "cuda"
        self._counter = Counter(CachingAllocator() if on_card else None, self.timeline)
        rules = rules_for(inspect_device()) if on_card else CPU_RULES
        self.tracker = StorageTracker(self._counter, rules, device_type=device.type)
        self._device = device
        self._peaks: dict[str, int] = {}
        self._allocator = Allocator()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tracks what happens inside as part of phase `name`."""
        self._remember()
        reset_peak(self._device)
        self.timeline.begin(name)
        try:
            with self.tracker, self._counter.phase(name):
                yield
        finally:
            self.timeline.end()
        self._saw(name)

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Only the card's own counter looks, at next to no cost; phase `name` must be known."""
        self._remember()
        reset_peak(self._device)
        yield
        self._saw(name)

    def release_cache(self) -> None:
        """What the allocator holds and nobody uses goes back to the card.

        After loading it is in the wrong sizes for training.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._counter.release_cache()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """With the allocator's peaks where there is one."""
        return tuple(p.at_least(self._peaks.get(p.name, 0)) for p in self._counter.phases)

    def allocator(self) -> Allocator:
        """The device's peaks over the whole job so far; zeros on a CPU."""
        self._remember()
        return self._allocator

    def describe(self) -> str:
        """What the figures were read from, for the reader."""
        if self._device.type == "cuda":
            return "peaks by torch's CUDA allocator, categories by the storage tracker"
        return "storage tracker (every tensor's bytes, and by rule what kernels allocate inside)"

    def _saw(self, name: str) -> None:
        allocated = self._remember().allocated
        self._peaks[name] = max(self._peaks.get(name, 0), allocated)

    def _remember(self) -> Allocator:
        """The counters' peaks since they were last reset, for the whole job's."""
        seen = read_allocator(self._device)
        self._allocator = self._allocator.or_more(seen)
        return seen
