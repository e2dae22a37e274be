"""Times and memory of a training run, for tool_process.py."""

from __future__ import annotations

import ctypes
import resource
import time
from pathlib import Path
from typing import Any


class Meter:
    """Times of the steps and the memory that they add, from outside of the tool.

    Seconds are those of the clock and of the processor (user and system, all threads). Memory on a
    CPU: the largest resident set of the process since `begin`, minus what is resident at `begin`;
    on a GPU the same of the allocator. Loading leaves freed memory in glibc's heap, more in some
    tools and bits than in others. The steps use it again, so it is returned to the system before.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.marks: list[tuple[float, float]] = []
        self.losses: list[float] = []
        self._before = 0

    def begin(self) -> None:
        """Mark the beginning of the first step: the model is loaded."""
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")
        self.mark()

    def mark(self) -> None:
        """Mark the end of a step."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append((time.perf_counter(), usage.ru_utime + usage.ru_stime))

    def result(self, skip: int) -> dict[str, Any]:
        """Return the figures. skip: number of first steps without a time of their own."""
        pairs = list(zip(self.marks[skip:], self.marks[skip + 1 :], strict=False))
        steps = [tuple(end - begin for begin, end in zip(*pair, strict=True)) for pair in pairs]
        whole = [end - begin for begin, end in zip(self.marks[0], self.marks[-1], strict=True)]
        return {
            "steps": len(self.marks) - 1,
            "clock_per_step": sum(step[0] for step in steps) / len(steps),
            "processor_per_step": sum(step[1] for step in steps) / len(steps),
            "clock": whole[0],
            "processor": whole[1],
            "losses": self.losses,
            "step_memory_bytes": self._peak() - self._before,
        }

    def _peak(self) -> int:
        if not self._on_gpu:
            return _resident("VmHWM")
        import torch

        return torch.cuda.max_memory_allocated()


def _resident(name: str) -> int:
    """Return a figure of this process' memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {name}")
