"""Memory as tables: a ledger's phases, before and after, and several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.results import Compared
from qlora_cli.memory.ledger import CATEGORIES, Ledger, Side, worst
from qlora_cli.units import format_bytes, format_ratio

METHODS = {"full": "full fine-tuning", "lora": "LoRA"}


def method_name(method: str, bits: int | None) -> str:
    """`LoRA, 4-bit base`; full fine-tuning has no base to speak of."""
    name = METHODS.get(method, method)
    return f"{name}, {bits}-bit base" if bits and method != "full" else name


def phase_table(ledger: Ledger) -> RenderableType:
    """Categories as rows, the job's phases as columns, the worst instant of each."""
    columns = {phase.name.replace("_", " "): phase.at_peak for phase in ledger.phases}
    table = _bytes_table(columns, "peak")
    live = [format_bytes(phase.live_bytes) for phase in ledger.phases]
    table.add_row("held afterwards", *live, style="dim")
    instrument = f"; {ledger.instrument}" if ledger.instrument else ""
    title = f"Memory on {device_line(ledger)}{instrument}"
    return Group(Text(title, style="bold"), table, *_allocator_lines(ledger))


def before_and_after(ledger: Ledger) -> RenderableType:
    """Full fine-tuning against this job, category by category, and the ratio."""
    sides = {_heading("before", ledger.before): ledger.before.at_peak}
    sides[_heading("after", ledger.after)] = ledger.after.at_peak
    table = _bytes_table(sides, "peak")
    told = f"{format_ratio(ledger.ratio)} less memory than full fine-tuning at the worst instant"
    return Group(Text("Memory before and after", style="bold"), table, Text(told, style="bold"))


def comparison(compared: Sequence[Compared]) -> RenderableType:
    """Several methods on the same data and batch."""
    columns = {method_name(one.method, one.bits): one.at_peak for one in compared}
    return Group(Text("The same data and batch", style="bold"), _bytes_table(columns, "peak"))


def device_line(ledger: Ledger) -> str:
    """`NVIDIA GeForce RTX 4090 (24.0 GiB)`."""
    device = ledger.device
    return f"{device.name} ({format_bytes(device.capacity_bytes)})"


def planned_against_measured(ledger: Ledger) -> str | None:
    """`planned 5.70 GiB, measured 5.73 GiB (-0.5 %)`; None while one of them is not known."""
    planned, measured = ledger.planned_peak_bytes, ledger.measured_peak_bytes
    if not planned or not measured:
        return None
    off = (planned - measured) / measured
    return f"planned {format_bytes(planned)}, measured {format_bytes(measured)} ({off:+.1%})"


def worst_phase(ledger: Ledger) -> str:
    """In which phase the peak is."""
    return worst(ledger.phases).name.replace("_", " ")


def _heading(when: str, side: Side) -> str:
    return f"{when}: {method_name(side.method, side.bits)} ({side.source})"


def _bytes_table(columns: Mapping[str, Mapping[str, int]], footer: str) -> Table:
    """One row a category that any column has, and the sum under them."""
    table = Table(box=box.SIMPLE, show_footer=True, pad_edge=False)
    table.add_column("", footer=footer)
    for name, at_peak in columns.items():
        total = format_bytes(sum(at_peak.values()))
        table.add_column(name, footer=total, justify="right", no_wrap=len(columns) > 2)
    for category in CATEGORIES:
        sizes = [at_peak.get(category, 0) for at_peak in columns.values()]
        if any(sizes):
            cells = [format_bytes(size) if size else "-" for size in sizes]
            table.add_row(category.replace("_", " "), *cells)
    return table


def _allocator_lines(ledger: Ledger) -> list[Text]:
    """What the device's own counters say, which no category holds; nothing on a CPU."""
    told = {
        "allocated by torch": ledger.allocator.allocated,
        "reserved by torch": ledger.allocator.reserved,
        "used on the card, context and libraries included": ledger.allocator.driver,
    }
    parts = [f"{name} {format_bytes(size)}" for name, size in told.items() if size]
    return [Text(f"Counters: {', '.join(parts)}")] if parts else []
