"""Reads the properties and the memory counters of the device that the job runs on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.host import host_capacity_bytes
from qlora_cli.memory.ledger import Allocator


def inspect_device() -> DeviceProfile:
    """Return the profile of the current CUDA GPU, or of the CPU if there is no GPU.

    The current one is the first, or the one of this process if several train together.
    """
    if not torch.cuda.is_available():
        return profile_of(torch.device("cpu"))
    return profile_of(torch.device("cuda", torch.cuda.current_device()))


def profile_of(device: torch.device) -> DeviceProfile:
    """Return the profile of a device of this machine. device: cpu or cuda."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        # Memory that this process' allocator has reserved belongs to the job.
        taken = total - free - torch.cuda.memory_reserved(device)
        return DeviceProfile(
            kind="cuda",
            name=properties.name,
            capacity_bytes=properties.total_memory,
            capability=(properties.major, properties.minor),
            multiprocessors=properties.multi_processor_count,
            context_bytes=max(taken, 0),
        )
    return DeviceProfile(kind="cpu", name=_cpu_name(), capacity_bytes=host_capacity_bytes())


def reset_peak(device: torch.device) -> None:
    """Start new peaks of the caching allocator's counters. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_allocator(device: torch.device) -> Allocator:
    """Return the caching allocator's peaks since `reset_peak` and the driver's used memory.

    All are in bytes; on a CPU all are zero.
    """
    if device.type != "cuda":
        return Allocator()
    free, total = torch.cuda.mem_get_info(device)
    return Allocator(
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
        driver=total - free,
    )


def live_and_peak(device: torch.device) -> tuple[int, int]:
    """Return (bytes in use now, peak bytes).

    On a GPU these are the caching allocator's counters, on a CPU the process' resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    live, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return live, peak


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
