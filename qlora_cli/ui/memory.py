"""Memory as tables: a ledger's phases, before and after, and several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.results import Compared
from qlora_cli.memory.ledger import CATEGORIES, InstrumentCost, Ledger, worst
from qlora_cli.units import format_bytes, format_duration, format_ratio

_METHODS = {"full": "full fine-tuning", "lora": "LoRA"}
_CATEGORIES = {"adapter": "adapter (trained)", "quant_constants": "quantization constants"}
"""Full fine-tuning's trained weights are `adapter` as well; the rest reads as it is."""
_FLOOR = "the floor is weights, adapter state, one block's working set and the blocks' inputs"
_UNSEEN = "temporaries and workspaces inside kernels, `other` in the table"
_CACHED = "freed blocks that torch keeps to use again, and fragmentation"
_OUTSIDE = "the CUDA context, modules and libraries, and other processes on the card"


@dataclass(frozen=True)
class Grid:
    """Bytes as text: categories as rows, phases or sides or methods as columns, sums below."""

    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    totals: tuple[str, ...]


def grid(columns: Mapping[str, Mapping[str, int]]) -> Grid:
    """The categories that any column has."""
    rows = {}
    for category in CATEGORIES:
        sizes = [at_peak.get(category, 0) for at_peak in columns.values()]
        if any(sizes):
            cells = tuple(format_bytes(size) if size else "-" for size in sizes)
            rows[category_name(category)] = cells
    totals = tuple(format_bytes(sum(at_peak.values())) for at_peak in columns.values())
    return Grid(tuple(columns), rows, totals)


def category_name(category: str) -> str:
    """A category of the ledger as people read it."""
    return _CATEGORIES.get(category, category)


def by_phase(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Name of each phase -> its worst instant."""
    return {phase.name.replace("_", " "): phase.at_peak for phase in ledger.phases}


def by_side(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Before and after, each with its method and where its figures come from."""
    return {
        f"{when}: {method_name(method_peak.method, method_peak.bits)} ({method_peak.source})": method_peak.at_peak
        for when, method_peak in (("before", ledger.before), ("after", ledger.after))
    }


def method_name(method: str, bits: int | None) -> str:
    """`LoRA, 4-bit base`; full fine-tuning has no base to speak of."""
    name = _METHODS.get(method, method)
    return f"{name}, {bits}-bit base" if bits and method != "full" else name


def phase_table(ledger: Ledger) -> RenderableType:
    """Categories as rows, the job's phases as columns, the worst instant of each."""
    table = _table(grid(by_phase(ledger)))
    weight_format = [format_bytes(phase.live_bytes) for phase in ledger.phases]
    table.add_row("held afterwards", *weight_format, style="dim")
    instrument = f"; {ledger.instrument}" if ledger.instrument else ""
    title = f"Memory on {device_line(ledger)}{instrument}"
    told = [f"{name} {size}" for name, size in counters(ledger).items()]
    lines = [Text(f"Counters: {', '.join(told)}")] if told else []
    return Group(Text(title, style="bold"), table, *lines)


def before_and_after(ledger: Ledger) -> RenderableType:
    """Full fine-tuning against this job, category by category, and the ratio."""
    title = Text("Memory before and after", style="bold")
    return Group(title, _table(grid(by_side(ledger))), Text(saving(ledger), style="bold"))


def comparison(compared: Sequence[Compared]) -> RenderableType:
    """Several methods on the same data and batch, and how many times smaller than the first."""
    columns = {method_name(one.method, one.bits): one.at_peak for one in compared}
    ratios = ("full / this", *(format_ratio(one.ratio) for one in compared))
    table = _table(grid(columns))
    for column, ratio in zip(table.columns, ratios, strict=True):
        column.footer = f"{column.footer}\n{ratio}"
    return Group(Text("The same data and batch", style="bold"), table)


def device_line(ledger: Ledger) -> str:
    """`NVIDIA GeForce RTX 4090 (24.0 GiB)`."""
    device = ledger.device
    return f"{device.name} ({format_bytes(device.capacity_bytes)})"


def saving(ledger: Ledger) -> str:
    """`3.1x less memory than full fine-tuning at the worst instant`."""
    return f"{format_ratio(ledger.ratio)} less memory than full fine-tuning at the worst instant"


def planned_against_measured(ledger: Ledger) -> str | None:
    """`planned 5.70 GiB, measured 5.73 GiB (-0.5%)`; None while one of them is not known."""
    planned, measured = ledger.planned_peak_bytes, ledger.measured_peak_bytes
    if not planned or not measured:
        return None
    return _against(planned, measured)


def worst_phase(ledger: Ledger) -> str:
    """In which phase the peak is."""
    return worst(ledger.phases).name.replace("_", " ")


def counters(ledger: Ledger) -> dict[str, str]:
    """What the device's own counters say, which no category holds; nothing on a CPU."""
    told = {
        "allocated by torch": ledger.allocator.allocated,
        "reserved by torch": ledger.allocator.reserved,
        "used on the card, context and libraries included": ledger.allocator.driver,
    }
    return {name: format_bytes(size) for name, size in told.items() if size}


def proof(ledger: Ledger) -> dict[str, str]:
    """What stands behind the figures, one sentence each; only what the ledger knows."""
    told = {
        "attributed": _attributed(ledger),
        "floor": _floor(ledger),
        "full fine-tuning": _before_measured(ledger),
        "instrument": _cost(ledger.instrument_cost),
    }
    return {name: text for name, text in told.items() if text}


def differences(ledger: Ledger) -> dict[str, str]:
    """The device's own counters, each with why it is more than the one before; empty on a CPU."""
    told, before = {}, ledger.after.peak_bytes - ledger.after.at_peak.get("other", 0)
    if not ledger.allocator.allocated:
        return {}
    for name, size, why in (
        ("all categories", before, ""),
        ("allocated by torch", ledger.allocator.allocated, _UNSEEN),
        ("reserved by torch", ledger.allocator.reserved, _CACHED),
        ("used on the card", ledger.allocator.driver, _OUTSIDE),
    ):
        if size:
            more = f"{format_bytes(size - before)} more: {why}"
            reason = more if size >= before else "read at a moment when less was in use"
            told[name] = f"{format_bytes(size)} ({reason})" if why else format_bytes(size)
            before = size
    return told


def _attributed(ledger: Ledger) -> str | None:
    method_peak = ledger.after
    if method_peak.source != "measured" or not method_peak.peak_bytes:
        return None
    other = method_peak.at_peak.get("other", 0)
    share = 1 - other / method_peak.peak_bytes
    judge = "" if ledger.allocator.allocated else "; a CPU keeps no counter to compare with"
    return f"{share:.1%} of the peak, other {format_bytes(other)}{judge}"


def _floor(ledger: Ledger) -> str | None:
    if not ledger.floor_bytes:
        return None
    ratio = format_ratio(ledger.after.peak_bytes / ledger.floor_bytes, digits=2)
    return f"{format_bytes(ledger.floor_bytes)}, peak {ratio} of it; {_FLOOR}"


def _before_measured(ledger: Ledger) -> str | None:
    planned, measured = ledger.before_planned_bytes, ledger.before.peak_bytes
    if not planned or ledger.before.source != "measured":
        return None
    return _against(planned, measured)


def _cost(cost: InstrumentCost | None) -> str | None:
    if cost is None:
        return None
    told = f"on for {cost.tracked_steps:,} of {cost.steps:,} steps, then off"
    if cost.tracked_seconds and cost.plain_seconds:
        told += (
            f"; such a step took {format_duration(cost.tracked_seconds)}, without it as many "
            f"tokens take {format_duration(cost.plain_seconds)}"
        )
    return f"{told}; its records held {format_bytes(cost.record_bytes)} on the host"


def _against(planned: int, measured: int) -> str:
    off = (planned - measured) / measured
    return f"planned {format_bytes(planned)}, measured {format_bytes(measured)} ({off:+.1%})"


def _table(shown: Grid) -> Table:
    table = Table(box=box.SIMPLE, show_footer=True, pad_edge=False)
    table.add_column("", footer="peak")
    for name, total in zip(shown.columns, shown.totals, strict=True):
        table.add_column(name, footer=total, justify="right", no_wrap=len(shown.columns) > 2)
    for category, cells in shown.rows.items():
        table.add_row(category, *cells)
    return table
