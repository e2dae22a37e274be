"""Measures the phases of a real job with the storage tracker and the device's own counter.

The tracker assigns bytes to categories. On CUDA the allocator's counter gives the exact peak of a
phase, and the difference between it and the tracker's peak is the category `other`. A CPU has no
such counter, so the tracker's figure is the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.device import read_allocator, reset_peak
from qlora_cli.memory.ledger import Allocator, Phase
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.timeline import Timeline


class Instrument:
    """Measures the phases of a real job on one device. profile: describes `device`."""

    def __init__(self, device: torch.device, profile: DeviceProfile) -> None:
        model = MemoryModel.of(profile)
        self.timeline = Timeline()
        self._counter = model.new_counter(timeline=self.timeline)
        self.tracker = model.new_tracker(self._counter, device.type)
        self._device = device
        self._peaks: dict[str, int] = {}
        self._allocator = Allocator()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as part of phase `name`, with the tracker on."""
        self._read_counters()
        reset_peak(self._device)
        self.timeline.begin(name)
        try:
            with self.tracker, self._counter.phase(name):
                yield
        finally:
            self.timeline.end()
        self._update_peak(name)

    @contextlib.contextmanager
    def count_only(self, name: str) -> Iterator[None]:
        """Measure the block as part of phase `name` with the device's counter alone.

        This costs almost nothing. The phase must have been measured with `phase` before.
        """
        self._read_counters()
        reset_peak(self._device)
        yield
        self._update_peak(name)

    def release_cache(self) -> None:
        """Return the allocator's unused cached memory to the GPU.

        After loading, the cached segments have sizes that training cannot use.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._counter.release_cache()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The measured phases, with the allocator's peaks on CUDA."""
        return tuple(p.at_least(self._peaks.get(p.name, 0)) for p in self._counter.phases)

    def allocator(self) -> Allocator:
        """Return the device's peaks over the complete job so far; zeros on a CPU."""
        self._read_counters()
        return self._allocator

    def describe(self) -> str:
        """Return a sentence for the report about the source of the figures."""
        if self._device.type == "cuda":
            return "peaks by torch's CUDA allocator, categories by the storage tracker"
        return "storage tracker (the bytes of every tensor, and by rule temporaries inside kernels)"

    def _update_peak(self, name: str) -> None:
        allocated = self._read_counters().allocated
        self._peaks[name] = max(self._peaks.get(name, 0), allocated)

    def _read_counters(self) -> Allocator:
        """Return the counters' peaks since the last reset and add them to the job's peaks."""
        peaks = read_allocator(self._device)
        self._allocator = self._allocator.larger_of_each(peaks)
        return peaks
