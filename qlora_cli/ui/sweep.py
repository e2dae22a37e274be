"""Render the result of `qlora sweep` as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
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
_MAX_TABLE = 10_000
"""Width that no table exceeds."""
_MAX_UNWRAPPED = 16
"""Width of the column of a setting from which on its values may be wrapped."""


def sweep(result: SweepResult) -> RenderableType:
    """Render one line per cell with mean and spread over its seeds, and what was not trained."""
    facts = [Text(line, style="yellow") for line in _not_done(result)]
    return Group(_Cells(result), Text(_legend(result)), *facts, Text(f"sweep: {result.folder}"))


@dataclass(frozen=True)
class _Cells:
    """The table of the cells. Its last columns are left out on a console without space for them.

    Settings and the metric that compares the cells are never left out.
    """

    result: SweepResult

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        metrics = self._metrics()
        shown, table = len(metrics), self._table(metrics)
        # A measurement is at most as wide as its options.
        wide = options.update(max_width=_MAX_TABLE)
        while shown > 1 and console.measure(table, options=wide).minimum > options.max_width:
            shown -= 1
            table = self._table(metrics[:shown])
        yield table
        if left_out := metrics[shown:]:
            names = ", ".join(map(metric_label, left_out))
            yield Text(f"Without {names}, which the console has no space for; sweep.json has them.")

    def _metrics(self) -> list[str]:
        """Return the metrics of the columns, the one that compares the cells first."""
        cells = self.result.table
        # The held-out loss is the better measure; sweep.json has the training loss.
        has_held_out = any("eval_loss" in cell.mean for cell in cells)
        names = dict.fromkeys(name for cell in cells for name in cell.mean)
        metrics = [name for name in names if not (has_held_out and name == "train_loss")]
        return sorted(metrics, key=lambda name: (name in _PLAIN, name != self.result.metric))

    def _table(self, metrics: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        cells, columns = self.result.table, []
        for key, label in short_keys(self.result.axes).items():
            texts = [cell.settings.get(key, "") for cell in cells]
            width = min(_width(label, texts), _MAX_UNWRAPPED)
            table.add_column(label, min_width=width, overflow="fold")
            columns.append(texts)
        texts = [str(len(cell.seeds)) if cell.seeds else cell.status for cell in cells]
        table.add_column("seeds", min_width=_width("seeds", texts), justify="right")
        columns.append(texts)
        for name in metrics:
            texts, label = [figure(cell, name) for cell in cells], metric_label(name)
            table.add_column(label, min_width=_width(label, texts), justify="right", no_wrap=True)
            columns.append(texts)
        for cell, line in zip(cells, zip(*columns, strict=True), strict=True):
            style = "bold green" if cell.is_best else ("" if cell.seeds else "dim")
            table.add_row(*map(Text, line), style=style)
        return table


def _width(label: str, texts: Sequence[str]) -> int:
    return max(map(len, (label, *texts)))


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
