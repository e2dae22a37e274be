"""How much memory is left, for a model that may be held where it fits and streamed where not."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

_SHARE = 0.8
"""Of what is left: the rest is for activations and for other programs."""
_LIMITS = {resource.RLIMIT_AS: "VmSize", resource.RLIMIT_DATA: "VmData"}
"""The operating system's limits on a process, and what of it counts towards each."""
_M_MMAP_THRESHOLD = -3
_OWN_PAGES_BYTES = 2**20


def give_back_freed() -> None:
    """From now on the process returns every tensor's memory to the system when the tensor dies.

    glibc keeps freed blocks of up to 32 MiB, once it has seen such, in a heap that only shrinks
    from its end; tensors that come and go in all sizes leave it full of holes. Measured on merging
    1.5 GB with `--base auto`: 1268 MiB resident at most without this, 733 MiB with it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_BYTES)


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether so much can be held on the device now."""
    return num_bytes < _SHARE * _free_bytes(device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    own = _kibibytes(Path("/proc/self/status"))
    found = [_kibibytes(Path("/proc/meminfo"))["MemAvailable"]]
    for kind, counted in _LIMITS.items():
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append(soft - own[counted])
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    if text.isdigit():
        found.append(int(text) - own["VmRSS"])
    return min(found)


def _kibibytes(file: Path) -> dict[str, int]:
    """The kernel's `Name:  1234 kB` lines, in bytes."""
    words = [line.split() for line in file.read_text().splitlines()]
    return {
        line[0].removesuffix(":"): int(line[1]) * 1024
        for line in words
        if len(line) == 3 and line[2] == "kB"
    }
