"""The speed of a device that is not measured: by published figures, else assumed."""

from __future__ import annotations

import torch

from qlora_cli.device import DeviceProfile
from qlora_cli.plan.step_time import DeviceSpeed
from qlora_cli.recipe.gpus import link_of, published_speed

MATRIX_EFFICIENCY = 0.6
BANDWIDTH_EFFICIENCY = 0.7
LINK_EFFICIENCY = 0.8
CALL_SECONDS = 10e-6
"""Assumed shares of the published speeds, and time to start a kernel. Not measured."""
_TERA, _GIGA = 1e12, 1e9
_ASSUMED_CPU = DeviceSpeed(
    40 * _GIGA,
    {"other": 8 * _GIGA, "dequantize": 2 * _GIGA},
    30e-6,
    "assumed 40 GFLOP/s and 8 GB/s; compare the times with each other only",
    4 * _GIGA,  # A copy reads and writes.
    "assumed 4 GB/s",
)


def published_device_speed(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed | None:
    """Return the speed of a GPU in a compute dtype by its published figures; None without them."""
    speed = published_speed(profile)
    if speed is None:
        return None
    link, link_source = _published_link(profile)
    tflops = speed.float32_tflops if compute == torch.float32 else speed.matrix_tflops
    return DeviceSpeed(
        flops_per_second=MATRIX_EFFICIENCY * tflops * _TERA,
        bytes_per_second={"other": BANDWIDTH_EFFICIENCY * speed.gigabytes_per_second * _GIGA},
        call_seconds=CALL_SECONDS,
        source=f"estimated from the published {tflops:g} TFLOP/s and "
        f"{speed.gigabytes_per_second:,.0f} GB/s of {profile.name}, of which a job is assumed to "
        f"reach {MATRIX_EFFICIENCY:.0%} and {BANDWIDTH_EFFICIENCY:.0%}; not measured",
        link_bytes_per_second=link,
        link_source=link_source,
    )


def assumed_speed(profile: DeviceProfile) -> DeviceSpeed:
    """Return a speed of a device of which nothing is known, to compare times with each other."""
    if profile.kind == "cpu":
        return _ASSUMED_CPU
    return DeviceSpeed(
        50 * _TERA,
        {"other": 500 * _GIGA},
        CALL_SECONDS,
        "assumed 50 TFLOP/s and 500 GB/s, because no figures of this GPU are known; compare the "
        "times with each other only",
        *_published_link(profile),
    )


def nominal_speed(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed:
    """Return the published speed, else the assumed one. It is the same in each process."""
    return published_device_speed(profile, compute) or assumed_speed(profile)


def _published_link(profile: DeviceProfile) -> tuple[float, str]:
    """Return the bytes per second of copies from host memory to a GPU, and the source.

    The speed is that of the GPU's generation and lanes of PCI Express.
    """
    link = link_of(profile)
    return LINK_EFFICIENCY * link.bytes_per_second, (
        f"{link.name}, {LINK_EFFICIENCY:.0%} of the {link.bytes_per_second / _GIGA:,.3g} GB/s of "
        "its specification assumed; not measured"
    )
