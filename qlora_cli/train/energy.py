"""Energy that the device uses, from counters of the hardware.

A GPU's driver counts millijoules since it was loaded (NVML, nvmlDeviceGetTotalEnergyConsumption, on
GPUs since Volta). A CPU counts microjoules of each package (RAPL; Linux shows them as files, which
often only root can read). Both count the complete device, with the work of other programs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
_EXTRA = "pip install 'qlora-cli[energy]'"


@dataclass(frozen=True)
class EnergyCounter:
    """A counter of the device's energy.

    source: name of the counter for run.json, or the reason why there is none. read: returns the
    joules since any fixed moment; None if there is no counter or it cannot be read any more.
    """

    source: str
    read: Callable[[], float | None]

    def since(self, start: float | None) -> float | None:
        """Return the joules since `read` returned `start`; None if either is unknown."""
        now = self.read() if start is not None else None
        return None if now is None or start is None else now - start


def energy_counter(
    device: torch.device, powercap: Path = POWERCAP, *, processes: int = 1
) -> EnergyCounter:
    """Return the counter of `device`. powercap: the folder of the system's RAPL counters.

    processes: number of processes that train the job. Several have devices of their own, or share
    one, and are not measured.
    """
    if processes > 1:
        return _none(f"the job runs in {processes} processes")
    return _gpu_counter(device) if device.type == "cuda" else _cpu_counter(powercap)


def _none(reason: str) -> EnergyCounter:
    return EnergyCounter(f"not measured: {reason}", lambda: None)


def _gpu_counter(device: torch.device) -> EnergyCounter:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return _none(f"nvidia-ml-py is not installed ({_EXTRA})")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(_uuid(device).encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return _none(f"the driver does not count energy ({error})")

    def read() -> float | None:
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except nvml.NVMLError:
            return None

    return EnergyCounter("NVML, the complete GPU", read)


def _uuid(device: torch.device) -> str:
    """Return the identity of a GPU, which does not depend on CUDA_VISIBLE_DEVICES."""
    properties: Any = torch.cuda.get_device_properties(device)
    return f"GPU-{properties.uuid}"


def _cpu_counter(powercap: Path) -> EnergyCounter:
    try:
        packages = sorted(
            name.parent
            for name in powercap.glob("*/name")
            if name.read_text().strip().startswith("package")
        )
        if not packages:
            return _none("this CPU has no RAPL counter")
        reading = _RaplReading(packages)
    except PermissionError as error:
        return _none(f"only root can read {error.filename}")
    except (OSError, ValueError) as error:
        return _none(f"the RAPL counter cannot be read ({error})")
    return EnergyCounter(f"RAPL, {len(packages)} complete CPU package(s)", reading)


class _RaplReading:
    """Returns the joules of all packages. A package's counter restarts at 0 after its range.

    Raises OSError or ValueError if a counter cannot be read at the start.
    """

    def __init__(self, packages: Sequence[Path]) -> None:
        self._counters = [package / "energy_uj" for package in packages]
        self._ranges = [_number(package / "max_energy_range_uj") for package in packages]
        self._last = [_number(counter) for counter in self._counters]
        self._total = 0

    def __call__(self) -> float | None:
        try:
            now = [_number(counter) for counter in self._counters]
        except (OSError, ValueError):
            return None
        for value, last, full in zip(now, self._last, self._ranges, strict=True):
            self._total += value - last + (full if value < last else 0)
        self._last = now
        return self._total / 1e6


def _number(file: Path) -> int:
    return int(file.read_text())
