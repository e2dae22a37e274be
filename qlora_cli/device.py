"""Properties of a compute device. This module imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DeviceProfile:
    """Properties of the GPU or CPU that a job runs on or is planned for.

    The recipe's automatic choices, the memory model and the attention kernel depend on these fields
    only, so that a job can be planned for a GPU that is not present.

    kind: "cuda" or "cpu".
    name: product name, for output.
    capacity_bytes: total memory of the GPU, or of the machine for a CPU.
    capability: CUDA compute capability, such as (8, 9) for an RTX 4090; None for a CPU.
    multiprocessors: number of streaming multiprocessors of the GPU; 0 for a CPU.
    context_bytes: part of `capacity_bytes` that the CUDA context and other processes use.
    is_planned: True for a GPU that was described by hand (`qlora plan --vram`).
    count: number of such devices that the job trains on, each with a process of its own.
    """

    kind: str
    name: str
    capacity_bytes: int
    capability: tuple[int, int] | None = None
    multiprocessors: int = 0
    context_bytes: int = 0
    is_planned: bool = False
    count: int = 1

    @property
    def usable_bytes(self) -> int:
        """Return the memory in bytes that a job can use."""
        return max(0, self.capacity_bytes - self.context_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as the `device` object of `qlora plan --json`.

        It has `count` if there are several devices.
        """
        content = asdict(self)
        content["imagined"] = content.pop("is_planned")  # The output's key. words: allow
        if self.count == 1:
            del content["count"]
        return content
