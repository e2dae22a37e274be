"""Render the result of `qlora sweep` as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.sweep_results import DONE, SweepCell, SweepResult
from qlora_cli.recipe.run_names import short_keys
from qlora_cli.units import format_bytes, format_count

_PLAIN = {
    "trainable_parameters": ("trained", lambda value: format_count(round(value))),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
    "peak_bytes": ("peak memory", lambda value: format_bytes(round(value))),
}
"""Metric -> name and format of its column. These hardly depend on the seed: no spread is shown."""


def sweep(result: SweepResult) -> RenderableType:
    """Render one line per cell with mean and spread over its seeds, and what was not trained."""
    # The held-out loss is the better measure; sweep.json has the training loss.
    has_held_out = any("eval_loss" in cell.mean for cell in result.table)
    metrics = [
        name
        for name in dict.fromkeys(name for cell in result.table for name in cell.mean)
        if not (has_held_out and name == "train_loss")
    ]
    metrics.sort(key=lambda name: (name in _PLAIN, name != result.metric))
    labels = short_keys(result.axes)
    table = Table(box=box.SIMPLE)
    for label in labels.values():
        table.add_column(label)
    for name in ("seeds", *metrics):
        table.add_column(metric_label(name), justify="right", no_wrap=name in metrics)
    for cell in result.table:
        settings = [cell.settings.get(key, "") for key in labels]
        figures = [figure(cell, name) for name in metrics]
        style = "bold green" if cell.is_best else ("" if cell.seeds else "dim")
        seeds = str(len(cell.seeds)) if cell.seeds else cell.status
        table.add_row(*map(Text, [*settings, seeds, *figures]), style=style)
    facts = [Text(line, style="yellow") for line in _not_done(result)]
    return Group(table, Text(_legend(result)), *facts, Text(f"sweep: {result.folder}"))


def metric_label(name: str) -> str:
    """Return the name of a metric for people."""
    known = {"eval_loss": "held-out loss", "train_loss": "train loss"}
    return _PLAIN[name][0] if name in _PLAIN else known.get(name, name)


def figure(cell: SweepCell, name: str) -> str:
    """Return the mean of a metric, with its spread if there are several seeds: `1.234 ± 0.012`."""
    if name not in cell.mean:
        return ""
    if name in _PLAIN:
        return _PLAIN[name][1](cell.mean[name])
    spread = f" ± {cell.spread[name]:.4f}" if name in cell.spread else ""
    return f"{cell.mean[name]:.4f}{spread}"


def _legend(result: SweepResult) -> str:
    order = "highest" if result.higher_is_better else "lowest"
    text = f"The line with the {order} {metric_label(result.metric)} is bold"
    if any(cell.spread for cell in result.table):
        text += "; ± is the standard deviation over the seeds"
    return f"{text}."


def _not_done(result: SweepResult) -> Iterator[str]:
    """Yield a line per run that is not done and per reason of cells that are not possible."""
    for run in result.runs:
        if run.status != DONE:
            yield f"! {run.name} {run.status}: {run.reason}"
    for reason, number in Counter(cell.reason for cell in result.refused).items():
        cells = "1 combination is" if number == 1 else f"{number:,} combinations are"
        yield f"! {cells} not possible: {reason}"
