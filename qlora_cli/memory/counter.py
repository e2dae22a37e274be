"""The account of living bytes: what is alive by category, and each phase's worst instant.

Fed with events, by the tracker of a real job or by a plan's recording. With a model of the CUDA
caching allocator (`allocator.py`) a storage costs the whole block that it is given, as in torch's
own `allocated` counter; without one it costs its bytes.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterator

from qlora_cli.memory.allocator import CachingAllocator
from qlora_cli.memory.ledger import CATEGORIES, Phase
from qlora_cli.memory.timeline import Timeline


class Counter:
    """Counts storages by key. timeline: told of every change, where there is one."""

    def __init__(
        self, allocator: CachingAllocator | None = None, timeline: Timeline | None = None
    ) -> None:
        self.allocator = allocator
        self.live_bytes = 0
        self.high_bytes = 0
        """The most since someone last set it to `live_bytes`; phases do not touch it."""
        self._timeline = timeline
        self._held: dict[Hashable, tuple[int, str]] = {}
        self._by_category: dict[str, int] = defaultdict(int)
        self._peak_bytes = 0
        self._at_peak: dict[str, int] = {}
        self._rising = False
        """Whether what lives now is the peak; its composition is taken when that changes."""
        self._phases: dict[str, Phase] = {}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases seen so far, in order; a phase seen twice is its worse time."""
        return tuple(self._phases.values())

    @property
    def peak_bytes(self) -> int:
        """The most since the current phase began."""
        return self._peak_bytes

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The peak of what happens inside becomes the phase's."""
        self.begin()
        yield
        self.end(name)

    def begin(self) -> None:
        """A phase begins."""
        self._peak_bytes, self._rising = self.live_bytes, True
        self._tell()

    def end(self, name: str) -> None:
        """The phase that began last was `name`."""
        self._settle()
        seen = Phase(name, self._peak_bytes, self.live_bytes, self._at_peak)
        before = self._phases.get(name)
        if before is None or before.peak_bytes <= seen.peak_bytes:
            self._phases[name] = seen

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        """A storage is made. Raises OutOfMemory where the allocator's limit is reached."""
        if self.allocator is not None:
            num_bytes = self.allocator.allocate(key, num_bytes)
        self._held[key] = (num_bytes, category)
        self._by_category[category] += num_bytes
        self.live_bytes += num_bytes
        self.high_bytes = max(self.high_bytes, self.live_bytes)
        if self.live_bytes > self._peak_bytes:
            self._peak_bytes, self._rising = self.live_bytes, True
        self._tell()

    def free(self, key: Hashable) -> None:
        """A storage is gone."""
        self._settle()
        num_bytes, category = self._held.pop(key)
        if self.allocator is not None:
            self.allocator.free(key)
        self._by_category[category] -= num_bytes
        self.live_bytes -= num_bytes
        self._tell()

    def recategorize(self, key: Hashable, category: str) -> None:
        """A living storage belongs to `category` from now on; the peak so far is as it was."""
        self._settle()
        num_bytes, before = self._held[key]
        self._held[key] = (num_bytes, category)
        self._by_category[before] -= num_bytes
        self._by_category[category] += num_bytes
        self._tell()

    def mark(self, name: str) -> None:
        """A part of a step begins."""
        if self._timeline is not None:
            self._timeline.mark(name)

    def enter(self, path: str) -> None:
        """Nothing here is counted by module."""

    def release_cache(self) -> None:
        """What the allocator holds and nobody uses goes back to the device."""
        if self.allocator is not None:
            self.allocator.release_cache()

    def _settle(self) -> None:
        if self._rising:
            by_category = self._by_category
            self._at_peak = {name: by_category[name] for name in CATEGORIES if by_category[name]}
            self._rising = False

    def _tell(self) -> None:
        if self._timeline is not None:
            self._timeline.changed(self._by_category)
