"""The plan as something rich can print: does it fit, what holds it, what would make it smaller."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.results import PlanResult
from qlora_cli.plan.results import Advice, Line
from qlora_cli.ui import memory
from qlora_cli.ui.tables import fact_lines
from qlora_cli.units import (
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_ratio,
)


def plan(result: PlanResult) -> RenderableType:
    """Whether the job fits, what it holds when, and what would make it smaller."""
    share = result.trainable_parameters / max(result.total_parameters, 1)
    facts = {
        "trained": f"{format_count(result.trainable_parameters)} of "
        f"{format_count(result.total_parameters)} parameters ({share:.2%})",
        "adapter on disk": format_bytes(result.adapter_bytes),
        "planned in": format_duration(result.seconds),
    }
    parts = [_verdict(result), memory.phase_table(result.ledger)]
    parts.append(memory.before_and_after(result.ledger))
    if result.compare:
        parts.append(memory.comparison(result.compare))
    if result.advice:
        parts.append(_advice(result.advice))
    if result.arithmetic:
        parts.append(_arithmetic(result.arithmetic))
    notes = [Text(f"Note: {note}.", style="dim") for note in result.notes]
    return Group(*parts, *notes, fact_lines(facts))


def _verdict(result: PlanResult) -> Text:
    ledger = result.ledger
    peak = format_bytes(ledger.planned_peak_bytes)
    word, style = ("fits", "bold green") if result.fits else ("DOES NOT FIT", "bold red")
    told = f" on {memory.device_line(ledger)}: needs {peak}, reached in phase "
    told += memory.worst_phase(ledger)
    if ledger.allocator.reserved:
        told += f"; {format_bytes(ledger.allocator.reserved)} reserved"
    return Text.assemble((word, style), f"{told}, of {format_bytes(result.usable_bytes)}")


def _advice(advice: Sequence[Advice]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("change")
    for column in ("saves", "peak then", "fits"):
        table.add_column(column, justify="right")
    for one in advice:
        sizes = (format_bytes(size) for size in (one.saves_bytes, one.peak_bytes))
        table.add_row(one.change, *sizes, "yes" if one.fits else "no")
    return Group(Text("Planned with these changes, each alone", style="bold"), table)


def _arithmetic(lines: Sequence[Line]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("counted")
    for line in lines:
        table.add_row(line.name, _value(line), line.assumption)
    return Group(Text("By the LoRA paper's arithmetic (decimal units)", style="bold"), table)


def _value(line: Line) -> str:
    if line.unit == "B":
        return format_decimal(int(line.value))
    return format_ratio(line.value) if line.unit == "x" else format_count(int(line.value))
