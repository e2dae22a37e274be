"""GPUs by name or memory, for plans of a GPU that is not present. This module imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

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
class PublishedSpeed:
    """Peak speeds of a GPU by the manufacturer.

    matrix_tflops: matrix products of float16 or bfloat16 with sums in float32, without sparsity.
    float32_tflops: float32. gigabytes_per_second: memory bandwidth, 10^9 bytes.
    """

    matrix_tflops: float
    float32_tflops: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class Link:
    """The link between host memory and a GPU. generation, lanes: of PCI Express."""

    generation: int
    lanes: int

    @property
    def name(self) -> str:
        """Return `PCIe 4.0 x16`."""
        return f"PCIe {self.generation}.0 x{self.lanes}"

    @property
    def bytes_per_second(self) -> float:
        """Return the largest speed in one direction by the specification (PCI-SIG).

        A lane has 8, 16 or 32 GT/s (generation 3, 4, 5), and 128 of 130 bits are data.
        """
        return 1e9 * float(2**self.generation) * self.lanes * 128 / 130 / 8


@dataclass(frozen=True)
class Gpu:
    """A GPU by the manufacturer's published figures.

    gib: memory in GiB. capability: CUDA compute capability. multiprocessors: number of streaming
    multiprocessors. speed: None if no figure of its matrix products was found.
    """

    name: str
    gib: int
    capability: tuple[int, int]
    multiprocessors: int
    speed: PublishedSpeed | None

    def profile(self) -> DeviceProfile:
        """Return the profile to plan for."""
        return planned_profile(self.name, self.gib * GIB, self.capability, self.multiprocessors)


def _gpus(capability: tuple[int, int], *rows: tuple[Any, ...]) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(name, gib, capability, count, PublishedSpeed(*speed) if speed else None)
        for name, gib, count, *speed in rows
    )


GPUS = (
    *_gpus((6, 0), ("P100", 16, 56, 9.3, 9.3, 732)),
    *_gpus(
        (6, 1),
        ("GTX 1070", 8, 15, 6.5, 6.5, 256),
        ("GTX 1080", 8, 20, 8.9, 8.9, 320),
        ("GTX 1080 Ti", 11, 28, 11.3, 11.3, 484),
    ),
    *_gpus((7, 0), ("V100", 16, 80, 125, 15.7, 900), ("V100 32GB", 32, 80, 125, 15.7, 900)),
    *_gpus(
        (7, 5),
        ("GTX 1650", 4, 14, 6, 3, 128),
        ("GTX 1660", 6, 22, 10, 5, 192),
        ("RTX 2060", 6, 30, 25.8, 6.5, 336),
        ("RTX 2070", 8, 36, 29.9, 7.5, 448),
        ("RTX 2080", 8, 46, 40.3, 10.1, 448),
        ("RTX 2080 Ti", 11, 68, 53.8, 13.4, 616),
        ("T4", 16, 40, 65, 8.1, 320),
    ),
    *_gpus(
        (8, 0),
        ("A30", 24, 56, 165, 10.3, 933),
        ("A100 40GB", 40, 108, 312, 19.5, 1555),
        ("A100 80GB", 80, 108, 312, 19.5, 2039),
    ),
    *_gpus(
        (8, 6),
        ("RTX 3050", 8, 20, 18.2, 9.1, 224),
        ("RTX 3060", 12, 28, 25.5, 12.7, 360),
        ("RTX 3060 Ti", 8, 38, 32.4, 16.2, 448),
        ("RTX 3070", 8, 46, 40.6, 20.3, 448),
        ("RTX 3070 Ti", 8, 48, 43.5, 21.7, 608),
        ("RTX 3080", 10, 68, 59.5, 29.8, 760),
        ("RTX 3080 12GB", 12, 70, 61.3, 30.6, 912),
        ("RTX 3080 Ti", 12, 80, 68.2, 34.1, 912),
        ("RTX 3090", 24, 82, 71, 35.6, 936),
        ("RTX 3090 Ti", 24, 84, 80, 40, 1008),
        ("RTX A4000", 16, 48, 76.7, 19.2, 448),
        ("RTX A5000", 24, 64, 111.1, 27.8, 768),
        ("RTX A6000", 48, 84, 154.8, 38.7, 768),
        ("A10", 24, 72, 125, 31.2, 600),
        ("A10G", 24, 80, 70, 35, 600),
        ("A40", 48, 84, 149.7, 37.4, 696),
    ),
    *_gpus(
        (8, 9),
        ("RTX 4060", 8, 24, 30.2, 15.1, 272),
        ("RTX 4060 Ti", 8, 34, 44.1, 22.1, 288),
        ("RTX 4060 Ti 16GB", 16, 34, 44.1, 22.1, 288),
        ("RTX 4070", 12, 46, 58.3, 29.1, 504),
        ("RTX 4070 Super", 12, 56, 70.9, 35.5, 504),
        ("RTX 4070 Ti", 12, 60, 80.2, 40.1, 504),
        ("RTX 4070 Ti Super", 16, 66, 88.2, 44.1, 672),
        ("RTX 4080", 16, 76, 97.5, 48.7, 717),
        ("RTX 4080 Super", 16, 80, 104.4, 52.2, 736),
        ("RTX 4090", 24, 128, 165.2, 82.6, 1008),
        ("RTX 4000 Ada", 20, 48),
        ("RTX 5000 Ada", 32, 100, 261.1, 65.3, 576),
        ("RTX 6000 Ada", 48, 142, 364.2, 91.1, 960),
        ("L4", 24, 58, 121, 30.3, 300),
        ("L40", 48, 142, 181, 90.5, 864),
        ("L40S", 48, 142, 362, 91.6, 864),
    ),
    *_gpus((9, 0), ("H100", 80, 132, 989, 67, 3350), ("H200", 141, 132, 989, 67, 4800)),
    *_gpus(
        (12, 0),
        ("RTX 5060", 8, 30, 38.3, 19.2, 448),
        ("RTX 5060 Ti", 8, 36, 47.4, 23.7, 448),
        ("RTX 5060 Ti 16GB", 16, 36, 47.4, 23.7, 448),
        ("RTX 5070", 12, 48, 61.7, 30.9, 672),
        ("RTX 5070 Ti", 16, 70, 87.9, 43.9, 896),
        ("RTX 5080", 16, 84, 112.6, 56.3, 960),
        ("RTX 5090", 32, 170, 209.5, 104.8, 1792),
    ),
)
"""NVIDIA GPUs that `--vram` accepts by name: desktop and data center models.

Columns: name, GiB, multiprocessors, and the fields of `PublishedSpeed`. Sources: NVIDIA's
whitepapers of the Pascal, Volta, Turing, Ampere (A100, GA102), Ada, Hopper and RTX Blackwell
architectures, and the data sheets of the products; data center GPUs in the SXM form if there is
one. GeForce GPUs sum in float32 at half speed. GPUs without tensor cores have the speed of float32,
those of Turing twice that of float32.
"""

_GENERATIONS = (((9, 0), 5), ((8, 0), 4), ((0, 0), 3))
"""(Least compute capability, generation of PCI Express). Not looked up for each GPU."""
_EIGHT_LANES = (
    *("RTX 3050", "RTX 4060", "RTX 4060 Ti", "RTX 4060 Ti 16GB"),
    *("RTX 5060", "RTX 5060 Ti", "RTX 5060 Ti 16GB"),
)
"""GPUs with 8 lanes; the others have 16. Sources: RTX 3050: TechPowerUp, "Gigabyte GeForce RTX 3050
Gaming OC Review"; RTX 4060, 4060 Ti and 5060 Ti: TechPowerUp, "NVIDIA GeForce RTX 5060 Ti
PCI-Express x8 Scaling"; RTX 5060: Tom's Hardware, "Asus swaps out the PCIe x16 connector for x8 on
new RTX 5060 Ti GPUs"."""

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


def planned_devices(text: str) -> DeviceProfile:
    """Return the profile of one of several equal GPUs that are not present: `2x24GiB`.

    Raises ValueError, with a message for the user, if the text is not a number of GPUs and a GPU.
    """
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(.+)", text)
    if match is None or int(match[1]) < 1:
        raise ValueError(
            f"{text!r} is not a number of GPUs and their memory or name; write 2x24GiB"
        )
    return replace(planned_gpu(match[2]), count=int(match[1]))


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


def published_speed(profile: DeviceProfile) -> PublishedSpeed | None:
    """Return the published speed of a GPU, by its name; None if it is not in the table."""
    gpu = _find(profile.name)
    return None if gpu is None else gpu.speed


def link_of(profile: DeviceProfile) -> Link:
    """Return the link that a GPU supports; the machine's own may be slower."""
    capability = profile.capability or (0, 0)
    generation = next(number for least, number in _GENERATIONS if capability >= least)
    gpu = _find(profile.name)
    return Link(generation, 8 if gpu is not None and gpu.name in _EIGHT_LANES else 16)


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
