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
from qlora_cli.plan.step_time import DeviceSpeed
from qlora_cli.recipe.gpus import published_speed, short_name

MATRIX_EFFICIENCY = 0.6
BANDWIDTH_EFFICIENCY = 0.7
CALL_SECONDS = 10e-6
"""Assumed shares of the published speeds, and time to start a kernel. Not measured."""
_SECONDS = 0.4
"""Time to measure each of five operations."""
_ROWS = 512
_COLUMNS = {"cuda": 4096, "cpu": 1024}
"""Width of the matrices. A GPU needs large ones; on a CPU the tensors of large ones are allocated
anew by the system each time, which those of small models are not."""
_TERA, _GIGA = 1e12, 1e9


def device_speed(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed | None:
    """Return the speed of a device in a compute dtype; None for a GPU without published figures.

    The device of this machine is measured once; the result is kept in the cache.
    """
    if profile.is_planned:
        return _published(profile, compute)
    file = _file(profile, compute)
    try:
        return DeviceSpeed(**json.loads(file.read_text())["speed"])
    except (OSError, *PARSE_ERRORS):
        pass
    speed = measure(torch.device(profile.kind), compute)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        description = f"{profile.name}: {speed.flops_per_second / _GIGA:,.0f} GFLOP/s"
        write_json(file, {"description": description, "speed": asdict(speed)})
    return speed


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


def _published(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed | None:
    speed = published_speed(profile)
    if speed is None:
        return None
    tflops = speed.float32_tflops if compute == torch.float32 else speed.matrix_tflops
    return DeviceSpeed(
        flops_per_second=MATRIX_EFFICIENCY * tflops * _TERA,
        bytes_per_second={"other": BANDWIDTH_EFFICIENCY * speed.gigabytes_per_second * _GIGA},
        call_seconds=CALL_SECONDS,
        source=f"estimated from the published {tflops:g} TFLOP/s and "
        f"{speed.gigabytes_per_second:,.0f} GB/s of {profile.name}, of which a job is assumed to "
        f"reach {MATRIX_EFFICIENCY:.0%} and {BANDWIDTH_EFFICIENCY:.0%}; not measured",
    )


def _file(profile: DeviceProfile, compute: torch.dtype) -> Path:
    threads = 0 if profile.kind == "cuda" else torch.get_num_threads()
    name = [profile.kind, short_name(profile.name), threads, str(compute), torch.__version__]
    return cache.entry_folder(cache.DEVICES, cache.key_of({"device": name})) / cache.ENTRY
