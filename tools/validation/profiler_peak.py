"""Peak memory measured by torch's profiler, which records every allocation on the CPU."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile


@dataclass
class PeakProfiler:
    """Counts the bytes of CPU tensors since it was created.

    peaks: phase -> highest peak of all its runs.
    """

    live_bytes: int = 0
    peaks: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is allocated and freed inside the block."""
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        sizes = []
        events = list(profiler.profiler.kineto_results.experimental_event_tree())
        while events:
            event = events.pop()
            events.extend(event.children)
            if event.tag.name == "Allocation":
                sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
        peak = self.live_bytes
        for _, size in sorted(sizes, key=lambda item: item[0]):
            self.live_bytes += size
            peak = max(peak, self.live_bytes)
        self.peaks[name] = max(peak, self.peaks.get(name, 0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence file descriptor 2, because the profiler's library writes to it."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
