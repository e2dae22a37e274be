"""Counts living bytes by category and stores each phase's peak.

The events come from the tracker of a real job or from the planner's recording. With a model of the
CUDA caching allocator (`allocator.py`) a storage costs the complete block that the allocator
assigns to it, as in torch's `memory_allocated`. Without one it costs its own bytes.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterator

from qlora_cli.memory.allocator import CachingAllocator
from qlora_cli.memory.ledger import CATEGORIES, Phase
from qlora_cli.memory.timeline import Timeline
from qlora_cli.memory.work import Work


class Counter:
    """A `MemoryListener` that counts storages. timeline: receives every change, if given."""

    def __init__(
        self, allocator: CachingAllocator | None = None, timeline: Timeline | None = None
    ) -> None:
        self.allocator = allocator
        self.live_bytes = 0
        self.high_bytes = 0
        """Highest `live_bytes` since the caller last reset it; phases do not change it."""
        self._timeline = timeline
        self._storages: dict[Hashable, tuple[int, str]] = {}
        """Key -> (bytes, category)."""
        self._by_category: dict[str, int] = defaultdict(int)
        self._peak_bytes = 0
        self._at_peak: dict[str, int] = {}
        self._is_at_peak = False
        """Whether `live_bytes` is the phase's peak; `_at_peak` is computed when that ends."""
        self._phases: dict[str, Phase] = {}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases so far, in order. A phase that ran more than once has its highest peak."""
        return tuple(self._phases.values())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as the phase `name`."""
        self.begin_phase()
        yield
        self.end_phase(name)

    def begin_phase(self) -> None:
        """Start a phase; its peak is at least the bytes that live now."""
        self._peak_bytes, self._is_at_peak = self.live_bytes, True
        self._update_timeline()

    def end_phase(self, name: str) -> None:
        """Store the phase that began last under `name`."""
        self._save_composition()
        phase = Phase(name, self._peak_bytes, self.live_bytes, self._at_peak)
        earlier = self._phases.get(name)
        if earlier is None or earlier.peak_bytes <= phase.peak_bytes:
            self._phases[name] = phase

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        """Count a new storage. Raises OutOfMemory if the allocator model reaches its limit."""
        if self.allocator is not None:
            num_bytes = self.allocator.allocate(key, num_bytes)
        self._storages[key] = (num_bytes, category)
        self._by_category[category] += num_bytes
        self.live_bytes += num_bytes
        self.high_bytes = max(self.high_bytes, self.live_bytes)
        if self.live_bytes > self._peak_bytes:
            self._peak_bytes, self._is_at_peak = self.live_bytes, True
        self._update_timeline()

    def free(self, key: Hashable) -> None:
        """Remove a storage."""
        self._save_composition()
        num_bytes, category = self._storages.pop(key)
        if self.allocator is not None:
            self.allocator.free(key)
        self._by_category[category] -= num_bytes
        self.live_bytes -= num_bytes
        self._update_timeline()

    def recategorize(self, key: Hashable, category: str) -> None:
        """Count a living storage under `category` from now on.

        A peak that was reached before keeps the old category.
        """
        self._save_composition()
        num_bytes, old_category = self._storages[key]
        self._storages[key] = (num_bytes, category)
        self._by_category[old_category] -= num_bytes
        self._by_category[category] += num_bytes
        self._update_timeline()

    def mark(self, name: str) -> None:
        """Add a mark to the timeline: a part of a training step begins."""
        if self._timeline is not None:
            self._timeline.mark(name)

    def work(self, work: Work) -> None:
        """Do nothing; a counter counts memory only."""

    def enter_module(self, path: str) -> None:
        """Do nothing; a counter does not count by module."""

    def release_cache(self) -> None:
        """Return the allocator model's unused segments to the device."""
        if self.allocator is not None:
            self.allocator.release_cache()

    def _save_composition(self) -> None:
        if self._is_at_peak:
            by_category = self._by_category
            self._at_peak = {name: by_category[name] for name in CATEGORIES if by_category[name]}
            self._is_at_peak = False

    def _update_timeline(self) -> None:
        if self._timeline is not None:
            self._timeline.update(self._by_category)
