"""How fast a device is: measured in two seconds if it is present, else by published figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from bitsandbytes import functional as bitsandbytes

from qlora_cli.device import DeviceProfile
from qlora_cli.files import cache
from qlora_cli.files.atomic import PARSE_ERRORS, write_json
from qlora_cli.plan.speeds import published_device_speed
from qlora_cli.plan.step_time import DeviceSpeed
from qlora_cli.recipe.gpus import short_name
from qlora_cli.units import MIB

_LINK_BYTES = {"cuda": 64 * MIB, "cpu": 16 * MIB}
"""Size of a copy to the device that is measured, about that of a block."""
_SECONDS = 0.4
"""Time to measure each of six operations."""
_ROWS = 512
_COLUMNS = {"cuda": 4096, "cpu": 1024}
"""Width of the matrices. A GPU needs large ones; on a CPU the tensors of large ones are allocated
anew by the system each time, which those of small models are not."""
_GIGA = 1e9


def device_speed(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed | None:
    """Return the speed of a device in a compute dtype; None for a GPU without published figures.

    The device of this machine is measured once; the result is kept in the cache.
    """
    if profile.is_planned:
        return published_device_speed(profile, compute)
    if known := _measured_before(profile, compute):
        return known
    speed, file = measure(torch.device(profile.kind), compute), _file(profile, compute)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        description = f"{profile.name}: {speed.flops_per_second / _GIGA:,.0f} GFLOP/s"
        write_json(file, {"description": description, "speed": asdict(speed)})
    return speed


def known_speed(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed | None:
    """Return the speed of a device as `device_speed`, without measuring it; None if unknown."""
    return _measured_before(profile, compute) or published_device_speed(profile, compute)


def measure(device: torch.device, compute: torch.dtype) -> DeviceSpeed:
    """Measure matrix products, memory bandwidth, dequantization and the time of a call.

    device: cpu or cuda. compute: dtype of the matrices. It takes about two seconds.
    """
    width = _COLUMNS[device.type]
    x = torch.randn(_ROWS, width, device=device, dtype=compute)
    weight = torch.randn(width, width, device=device, dtype=compute)
    packed, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4")
    one = torch.ones(1, device=device)
    with torch.no_grad():
        product = _seconds(lambda: x @ weight, device)
        multiply = _seconds(lambda: weight * weight, device)
        activate = _seconds(lambda: torch.nn.functional.silu(weight), device)
        dequantize = _seconds(lambda: bitsandbytes.dequantize_4bit(packed, state), device)
        call = _seconds(lambda: one + one, device)
        copied = torch.empty(_LINK_BYTES[device.type], dtype=torch.uint8, device=device)
        host = torch.empty_like(copied, device="cpu", pin_memory=device.type == "cuda")
        copy = _seconds(lambda: copied.copy_(host, non_blocking=True), device)
    size = weight.numel() * weight.element_size()
    return DeviceSpeed(
        flops_per_second=2 * x.numel() * width / product,
        bytes_per_second={
            "other": 5 * size / (multiply + activate),
            "dequantize": (size + packed.numel()) / dequantize,
        },
        call_seconds=call,
        source=f"estimated from the speed of single operations, measured on this "
        f"{'GPU' if device.type == 'cuda' else 'CPU'} on {time.strftime('%Y-%m-%d')}",
        link_bytes_per_second=host.nbytes / copy,
        link_source=f"{host.nbytes / copy / _GIGA:,.3g} GB/s, measured on this machine",
    )


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    """Return the mean time of an operation in seconds. It is repeated for about `_SECONDS`."""
    operation()
    _wait(device)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        operation()
        number += 1
        # One wait per call would add its own time on a GPU.
        if number % 20 == 0:
            _wait(device)
    _wait(device)
    return (time.perf_counter() - start) / number


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measured_before(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed | None:
    """Return the stored speed of a device of this machine."""
    try:
        return DeviceSpeed(**json.loads(_file(profile, compute).read_text())["speed"])
    except (OSError, *PARSE_ERRORS):
        return None


def _file(profile: DeviceProfile, compute: torch.dtype) -> Path:
    threads = 0 if profile.kind == "cuda" else torch.get_num_threads()
    name = [profile.kind, short_name(profile.name), threads, str(compute), torch.__version__]
    return cache.entry_folder(cache.DEVICES, cache.key_of({"device": name})) / cache.ENTRY
