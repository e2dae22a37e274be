"""GPUs by name or memory, for plans of a GPU that is not present. This module imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from qlora_cli.device import DeviceProfile
from qlora_cli.units import GIB, MIB, parse_bytes

CONTEXT_BYTES = 512 * MIB
"""Reserved for the CUDA context and its modules on a planned GPU; an assumption, not measured."""
_MIN_CAPACITY_BYTES = MIB
_BARE_NUMBER = re.compile(r"\s*\d+(\.\d+)?\s*")
_MAX_GIB = 1024
"""A number without a unit that is smaller than this is in GiB."""
_MEMORY_SUFFIX = re.compile(r"(\d+)\s*gi?b?$", re.IGNORECASE)
_IGNORED = re.compile(r"nvidia|geforce|tesla|quadro|\brtx|\bgtx|[\s_-]+", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """A GPU by the manufacturer's published figures.

    gib: memory in GiB. capability: CUDA compute capability. multiprocessors: number of streaming
    multiprocessors.
    """

    name: str
    gib: int
    capability: tuple[int, int]
    multiprocessors: int

    def profile(self) -> DeviceProfile:
        """Return the profile to plan for."""
        return planned_profile(self.name, self.gib * GIB, self.capability, self.multiprocessors)


def _gpus(capability: tuple[int, int], *rows: tuple[str, int, int]) -> tuple[Gpu, ...]:
    return tuple(Gpu(name, gib, capability, count) for name, gib, count in rows)


GPUS = (
    *_gpus((6, 0), ("P100", 16, 56)),
    *_gpus((6, 1), ("GTX 1070", 8, 15), ("GTX 1080", 8, 20), ("GTX 1080 Ti", 11, 28)),
    *_gpus((7, 0), ("V100", 16, 80), ("V100 32GB", 32, 80)),
    *_gpus(
        (7, 5),
        *(("GTX 1650", 4, 14), ("GTX 1660", 6, 22), ("RTX 2060", 6, 30), ("RTX 2070", 8, 36)),
        *(("RTX 2080", 8, 46), ("RTX 2080 Ti", 11, 68), ("T4", 16, 40)),
    ),
    *_gpus((8, 0), ("A30", 24, 56), ("A100 40GB", 40, 108), ("A100 80GB", 80, 108)),
    *_gpus(
        (8, 6),
        *(("RTX 3050", 8, 20), ("RTX 3060", 12, 28), ("RTX 3060 Ti", 8, 38), ("RTX 3070", 8, 46)),
        *(("RTX 3070 Ti", 8, 48), ("RTX 3080", 10, 68), ("RTX 3080 12GB", 12, 70)),
        *(("RTX 3080 Ti", 12, 80), ("RTX 3090", 24, 82), ("RTX 3090 Ti", 24, 84)),
        *(("RTX A4000", 16, 48), ("RTX A5000", 24, 64), ("RTX A6000", 48, 84)),
        *(("A10", 24, 72), ("A10G", 24, 80), ("A40", 48, 84)),
    ),
    *_gpus(
        (8, 9),
        *(("RTX 4060", 8, 24), ("RTX 4060 Ti", 8, 34), ("RTX 4060 Ti 16GB", 16, 34)),
        *(("RTX 4070", 12, 46), ("RTX 4070 Super", 12, 56), ("RTX 4070 Ti", 12, 60)),
        *(("RTX 4070 Ti Super", 16, 66), ("RTX 4080", 16, 76), ("RTX 4080 Super", 16, 80)),
        *(("RTX 4090", 24, 128), ("RTX 4000 Ada", 20, 48), ("RTX 5000 Ada", 32, 100)),
        *(("RTX 6000 Ada", 48, 142), ("L4", 24, 58), ("L40", 48, 142), ("L40S", 48, 142)),
    ),
    *_gpus((9, 0), ("H100", 80, 132), ("H200", 141, 132)),
    *_gpus(
        (12, 0),
        *(("RTX 5060", 8, 30), ("RTX 5060 Ti", 8, 36), ("RTX 5060 Ti 16GB", 16, 36)),
        *(("RTX 5070", 12, 48), ("RTX 5070 Ti", 16, 70), ("RTX 5080", 16, 84)),
        *(("RTX 5090", 32, 170),),
    ),
)
"""NVIDIA GPUs that `--vram` accepts by name: desktop and data center models."""

_EXAMPLE_SIZES = (
    *((8, "RTX 4060"), (12, "RTX 4070"), (16, "RTX 4080"), (24, "RTX 4090"), (32, "RTX 5090")),
    *((48, "RTX 6000 Ada"), (80, "A100 80GB or H100"), (141, "H200")),
)
"""(GiB, example) of the sizes that are suggested for a job that does not fit."""


def planned_gpu(text: str) -> DeviceProfile:
    """Return the profile of a GPU that is not present.

    text: its memory (`24GiB`, `12GB`, or `12`, which is in GiB) or its name (`RTX 4090`). For a
    size, the other properties are those of an RTX 4090. Raises ValueError, with a message for the
    user, if the text is neither.
    """
    gpu = _find(text)
    if gpu is not None:
        return gpu.profile()
    if re.match(r"\s*\d", text) is None:
        near = difflib.get_close_matches(text.lower(), [item.name.lower() for item in GPUS], n=3)
        names = {item.name.lower(): item.name for item in GPUS}
        known = " or ".join(names[name] for name in near) or "RTX 4090"
        raise ValueError(
            f"{text!r} is neither a size nor a known GPU; write its memory, 24GiB, or a name such "
            f"as {known}"
        )
    capacity = parse_bytes(text)
    if _BARE_NUMBER.fullmatch(text) and float(text) < _MAX_GIB:
        capacity = int(float(text) * GIB)
    if capacity < _MIN_CAPACITY_BYTES:
        raise ValueError(f"{text} is less memory than any GPU has; write it with its unit, 24GiB")
    return planned_profile("a planned GPU", capacity, (8, 9), 128)


def planned_profile(
    name: str, capacity_bytes: int, capability: tuple[int, int], multiprocessors: int
) -> DeviceProfile:
    """Return the profile of a GPU that is not present, with the assumed size of its context."""
    return DeviceProfile(
        kind="cuda",
        name=name,
        capacity_bytes=capacity_bytes,
        capability=capability,
        multiprocessors=multiprocessors,
        context_bytes=CONTEXT_BYTES,
        is_planned=True,
    )


def size_that_fits(needed_bytes: int) -> str | None:
    """Return the smallest common GPU size for a job: `16 GiB (such as RTX 4080)`, or None.

    needed_bytes: memory that the job reserves, without the CUDA context.
    """
    for gib, example in _EXAMPLE_SIZES:
        if needed_bytes + CONTEXT_BYTES <= gib * GIB:
            return f"{gib} GiB (such as {example})"
    return None


def _find(text: str) -> Gpu | None:
    """Return the GPU with this name; the smaller one if a model exists with two sizes."""
    wanted = short_name(text)
    if _BARE_NUMBER.fullmatch(text):
        return None  # A size. `4090` alone is not accepted as a name.
    for gpu in GPUS:
        name = short_name(_MEMORY_SUFFIX.sub("", gpu.name))
        if wanted in (short_name(gpu.name), name, f"{name}{gpu.gib}gb"):
            return gpu
    return None


def short_name(name: str) -> str:
    """Return a GPU's name without manufacturer and series: `4090` of `NVIDIA GeForce RTX 4090`."""
    return _IGNORED.sub("", name).lower()
