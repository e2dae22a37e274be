"""Render the result of `qlora plan`: whether the job fits, its memory, and how to reduce it."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.results import PlanResult
from qlora_cli.plan.results import Advice, Line
from qlora_cli.ui import memory
from qlora_cli.ui.memory_facts import device_text
from qlora_cli.ui.tables import fact_lines
from qlora_cli.units import (
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_ratio,
)


def plan(result: PlanResult) -> RenderableType:
    """Render whether the job fits, the memory tables, the advice and the notes."""
    share = result.trainable_parameters / max(result.total_parameters, 1)
    facts = {
        "trained": f"{format_count(result.trainable_parameters)} of "
        f"{format_count(result.total_parameters)} parameters ({share:.2%})",
        "adapter on disk": format_bytes(result.adapter_bytes),
        "planning time": format_duration(result.seconds),
    }
    parts = [_verdict(result), memory.phase_table(result.ledger)]
    parts.append(memory.method_table(result.ledger))
    if result.compare:
        parts.append(memory.comparison_table(result.compare))
    if result.advice:
        parts.append(_advice_table(result.advice))
    if result.arithmetic:
        parts.append(_arithmetic_table(result.arithmetic))
    notes = [Text(f"Note: {note}.", style="dim") for note in result.notes]
    return Group(*parts, *notes, fact_lines(facts))


def _verdict(result: PlanResult) -> Text:
    """Return whether the job fits, with its planned peak and the memory it may use."""
    ledger = result.ledger
    verdict, style = ("fits", "bold green") if result.fits else ("DOES NOT FIT", "bold red")
    text = f" on {device_text(ledger)}: peak {format_bytes(ledger.planned_peak_bytes)} "
    text += f"in phase {memory.peak_phase_name(ledger)}"
    if ledger.allocator.reserved:
        text += f", {format_bytes(ledger.allocator.reserved)} reserved"
    text += f"; {format_bytes(result.usable_bytes)} usable"
    return Text.assemble((verdict, style), text)


def _advice_table(advice: Sequence[Advice]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("change")
    for column in ("saves", "new peak", "fits"):
        table.add_column(column, justify="right")
    for row in advice:
        sizes = (format_bytes(size) for size in (row.saves_bytes, row.peak_bytes))
        table.add_row(row.change, *sizes, "yes" if row.fits else "no")
    return Group(Text("Changes that reduce the peak, each planned on its own", style="bold"), table)


def _arithmetic_table(lines: Sequence[Line]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("what is counted")
    for line in lines:
        table.add_row(line.name, _value(line), line.assumption)
    title = "Sizes by the arithmetic of the LoRA paper (decimal units)"
    return Group(Text(title, style="bold"), table)


def _value(line: Line) -> str:
    if line.unit == "B":
        return format_decimal(int(line.value))
    return format_ratio(line.value) if line.unit == "x" else format_count(int(line.value))
