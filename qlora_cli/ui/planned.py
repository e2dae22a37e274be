"""Render the result of `qlora plan`: whether the job fits, its memory, and how to reduce it."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.results import PlanResult
from qlora_cli.plan.results import Advice, Line
from qlora_cli.recipe.gpus import size_that_fits
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

_TIME = "time of a million tokens"
_LIMITS = {
    "model": "the model's positions",
    "memory": "the device's memory",
    "search": "the end of the search; larger sizes may fit",
}


def plan(result: PlanResult, *, details: bool = True) -> RenderableType:
    """Render whether the job fits, the advice and the sizes; with `details` also all tables."""
    share = result.trainable_parameters / max(result.total_parameters, 1)
    facts = {
        "trained": f"{format_count(result.trainable_parameters)} of "
        f"{format_count(result.total_parameters)} parameters ({share:.2%})",
        "adapter on disk": format_bytes(result.adapter_bytes),
        "planning time": format_duration(result.seconds),
    }
    if result.disk:
        facts["run on disk"] = f"about {format_bytes(result.disk.run_bytes)}, with checkpoints"
        facts["merged model on disk"] = f"about {format_bytes(result.disk.merged_bytes)} in 16 bit"
    parts: list[RenderableType] = [_verdict(result), *_sentences(result)]
    if details:
        parts += [memory.phase_table(result.ledger), memory.method_table(result.ledger)]
    if result.compare:
        parts.append(memory.comparison_table(result.compare))
    sizes = [item for item in result.advice if item.limit]
    changes = [item for item in result.advice if not item.limit]
    if sizes:
        parts.append(_size_table(sizes))
    if changes:
        parts.append(_advice_table(changes))
    if details and result.arithmetic:
        parts.append(_arithmetic_table(result.arithmetic))
    notes = [Text(f"Note: {note}.", style="dim") for note in result.notes] if details else []
    more = [] if details else [Text("Tables by phase and method: --details", style="dim")]
    return Group(*parts, *notes, fact_lines(facts), *more)


def _verdict(result: PlanResult) -> Text:
    """Return whether the job fits, with the memory it needs and the memory it may use."""
    ledger = result.ledger
    verdict, style = (
        ("Yes, fits", "bold green") if result.fits else ("No, DOES NOT FIT", "bold red")
    )
    needed = _needed_bytes(result)
    number = result.device.get("count", 1)
    text = f" on each of {number} devices," if number > 1 else " on"
    text += f" {device_text(ledger)}: {format_bytes(needed)} of "
    text += f"{format_bytes(result.usable_bytes)}; tensors need "
    text += f"{format_bytes(ledger.planned_peak_bytes)} in phase "
    return Text.assemble((verdict, style), f"{text}{memory.peak_phase_name(ledger)}.")


def _needed_bytes(result: PlanResult) -> int:
    """Return the planned memory of tensors, or of the caching allocator on a GPU."""
    return result.ledger.allocator.reserved or result.ledger.planned_peak_bytes


def _sentences(result: PlanResult) -> list[Text]:
    """Return what follows the verdict: a GPU that fits or the longest context, time, data."""
    lines = []
    lengths = [item for item in result.advice if item.change.startswith("data.seq_len=")]
    lengths = [item for item in lengths if item.limit]
    if not result.fits:
        size = size_that_fits(_needed_bytes(result))
        text = f"A GPU with {size} would do." if size else "No common GPU has enough memory."
        lines.append(Text(text))
    elif lengths:
        tokens = int(lengths[0].change.split()[0].partition("=")[2])
        text = f"Longest context that fits: {format_count(tokens)} tokens, limited by "
        lines.append(Text(f"{text}{_LIMITS[lengths[0].limit]}."))
    else:
        lines.append(Text("Longest context that fits: --fit searches it."))
    if result.row_limit is not None:
        limit = format_count(result.row_limit)
        text = f"A row may have {limit} tokens, the base's positions; data.seq_len is longer and "
        lines.append(Text(f"{text}holds several rows."))
    lines += [Text(f"{choice.key} = {choice.value}: {choice.reason}.") for choice in result.choices]
    lines += [Text(text) for text in _duration(result)]
    if (copies := result.time.copies) is not None:
        times = map(format_duration, (copies.copy_seconds, copies.compute_seconds))
        lines.append(Text(copies.text(format_bytes(copies.bytes_per_step), *times)))
    if result.data_problem:
        lines.append(Text(result.data_problem, style="yellow"))
    return lines


def _duration(result: PlanResult) -> list[str]:
    """Return the length and the time of training, and a warning if it has too few updates."""
    length, time = result.length, result.time
    if length is None:
        reason = f" ({result.length_problem})" if result.length_problem else ""
        steps = f"as many steps as the rows give{reason}"
        if result.steps is not None:
            steps = f"{format_count(result.steps)} steps{reason}"
        if time.step_seconds is None:
            return [f"Duration: {steps}; the time of a step is {time.source}."]
        step = format_duration(time.step_seconds)
        return [f"Duration: {steps}; a step takes {step}, {time.source}."]
    lines = [f"Length: {length.text()}."]
    if time.total_seconds is None:
        lines.append(f"Duration: {time.source}.")
    else:
        lines.append(f"Duration: about {format_duration(time.total_seconds)}, {time.source}.")
    return [*lines, *([warning] if (warning := length.warning()) else [])]


def _size_table(sizes: Sequence[Advice]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("size", "peak", "limited by", _TIME):
        table.add_column(column)
    for row in sizes:
        table.add_row(row.change, format_bytes(row.peak_bytes), _LIMITS[row.limit], _time(row))
    title = Text("Largest sizes that fit, the fastest first", style="bold")
    return Group(title, table, _time_source(sizes))


def _advice_table(advice: Sequence[Advice]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("change")
    for column in ("saves", "new peak", "fits", _TIME):
        table.add_column(column, justify="right")
    for row in advice:
        sizes = (format_bytes(size) for size in (row.saves_bytes, row.peak_bytes))
        table.add_row(row.change, *sizes, "yes" if row.fits else "no", _time(row))
    title = Text("Changes that reduce the peak, each planned on its own, the fastest first")
    title.stylize("bold")
    return Group(title, table, _time_source(advice))


def _time(row: Advice) -> str:
    """Return `5 min 20 s (1.31x)`: the time and its ratio to that of the unchanged recipe."""
    seconds = format_duration(1e6 * row.seconds_per_token)
    return f"{seconds} ({format_ratio(row.time_ratio, 2)})"


def _time_source(advice: Sequence[Advice]) -> Text:
    return Text(f"Times: {advice[0].time_source}.", style="dim")


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
