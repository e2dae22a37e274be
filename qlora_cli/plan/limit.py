"""How much memory a job may use whose settings are chosen for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.host import available_bytes
from qlora_cli.units import format_bytes

GPU_SHARE = 0.95
"""Share of a GPU's usable memory. Plans of reserved memory are within 1 % of what torch's allocator
reserves; the rest is for memory that libraries allocate outside of the allocator."""
HOST_SHARE = 0.5
"""Share of the free host memory. Other programs run on the same CPU, and a plan counts tensors and
not the libraries of the process."""


@dataclass(frozen=True)
class Limit:
    """The memory that a job with chosen settings may use. text: the same for people."""

    num_bytes: int
    text: str


def limit_of(profile: DeviceProfile) -> Limit:
    """Return the limit of a device; of a CPU it depends on the memory that is free now."""
    if profile.kind == "cuda":
        num_bytes = int(profile.usable_bytes * GPU_SHARE)
        return Limit(num_bytes, f"{format_bytes(num_bytes)} ({GPU_SHARE:.0%} of what can be used)")
    free = min(profile.usable_bytes, available_bytes(torch.device("cpu")))
    num_bytes = int(free * HOST_SHARE)
    return Limit(num_bytes, f"{format_bytes(num_bytes)} ({HOST_SHARE:.0%} of the free memory)")
