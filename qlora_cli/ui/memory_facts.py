"""Sentences about a ledger: the device, its counters, and how reliable the figures are."""

from __future__ import annotations

from qlora_cli.memory.ledger import InstrumentCost, Ledger
from qlora_cli.units import format_bytes, format_duration, format_ratio

_FLOOR = "packed weights, adapter state, the working set of one block and the inputs of all blocks"
_INSIDE_KERNELS = "memory that kernels allocate internally, `other` in the table"
_CACHED = "freed blocks that torch's caching allocator keeps, and fragmentation"
_OUTSIDE_TORCH = "the CUDA context, kernels and libraries, and other processes on the GPU"


def device_text(ledger: Ledger) -> str:
    """Return the device and its memory: `NVIDIA GeForce RTX 4090 (24.0 GiB)`."""
    device = ledger.device
    return f"{device.name} ({format_bytes(device.capacity_bytes)})"


def saving(ledger: Ledger) -> str:
    """Return `3.1x less peak memory than full fine-tuning`."""
    return f"{format_ratio(ledger.ratio)} less peak memory than full fine-tuning"


def planned_and_measured(ledger: Ledger) -> str | None:
    """Return `planned 5.70 GiB, measured 5.73 GiB (-0.5%)`, or None if either is unknown."""
    planned, measured = ledger.planned_peak_bytes, ledger.measured_peak_bytes
    if not planned or not measured:
        return None
    return _difference(planned, measured)


def counters(ledger: Ledger) -> dict[str, str]:
    """Return the peaks of the device's own counters; empty on a CPU, which has none."""
    peaks = {
        "allocated by torch": ledger.allocator.allocated,
        "reserved by torch": ledger.allocator.reserved,
        "used on the GPU, with CUDA context and libraries": ledger.allocator.driver,
    }
    return {name: format_bytes(size) for name, size in peaks.items() if size}


def counter_differences(ledger: Ledger) -> dict[str, str]:
    """Return each counter of the device with the reason why it is higher than the previous one.

    The first entry is the sum of the categories that the tracker attributes. Empty on a CPU.
    """
    if not ledger.allocator.allocated:
        return {}
    previous = ledger.after.peak_bytes - ledger.after.at_peak.get("other", 0)
    lines = {"sum of the categories": format_bytes(previous)}
    for name, size, cause in (
        ("allocated by torch", ledger.allocator.allocated, _INSIDE_KERNELS),
        ("reserved by torch", ledger.allocator.reserved, _CACHED),
        ("used on the GPU", ledger.allocator.driver, _OUTSIDE_TORCH),
    ):
        if size:
            reason = f"{format_bytes(size - previous)} more: {cause}"
            if size < previous:
                reason = "less, because it was read at another moment"
            lines[name] = f"{format_bytes(size)} ({reason})"
            previous = size
    return lines


def reliability(ledger: Ledger) -> dict[str, str]:
    """Return how reliable the figures are, one sentence each; unknown facts are left out."""
    facts = {
        "attributed to categories": _attributed(ledger),
        "lower bound": _lower_bound(ledger),
        "full fine-tuning": _full_fine_tuning(ledger),
        "cost of measuring": _cost(ledger.instrument_cost),
    }
    return {name: text for name, text in facts.items() if text}


def _attributed(ledger: Ledger) -> str | None:
    peak = ledger.after
    if peak.source != "measured" or not peak.peak_bytes:
        return None
    other = peak.at_peak.get("other", 0)
    share = 1 - other / peak.peak_bytes
    limit = "" if ledger.allocator.allocated else "; a CPU has no counter to compare with"
    return f"{share:.1%} of the peak, other {format_bytes(other)}{limit}"


def _lower_bound(ledger: Ledger) -> str | None:
    if not ledger.floor_bytes:
        return None
    ratio = format_ratio(ledger.after.peak_bytes / ledger.floor_bytes, digits=2)
    return f"{format_bytes(ledger.floor_bytes)} ({_FLOOR}); the peak is {ratio} of it"


def _full_fine_tuning(ledger: Ledger) -> str | None:
    planned, measured = ledger.before_planned_bytes, ledger.before.peak_bytes
    if not planned or ledger.before.source != "measured":
        return None
    return _difference(planned, measured)


def _cost(cost: InstrumentCost | None) -> str | None:
    if cost is None:
        return None
    text = f"tracker on for {cost.tracked_steps:,} of {cost.steps:,} steps"
    if cost.tracked_seconds and cost.plain_seconds:
        text += (
            f"; {format_duration(cost.tracked_seconds)} per step with it, "
            f"{format_duration(cost.plain_seconds)} without it for as many tokens"
        )
    return f"{text}; its records took {format_bytes(cost.record_bytes)} of CPU memory"


def _difference(planned: int, measured: int) -> str:
    error = (planned - measured) / measured
    return f"planned {format_bytes(planned)}, measured {format_bytes(measured)} ({error:+.1%})"
