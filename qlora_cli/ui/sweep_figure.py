"""Draw the result of `qlora sweep`: the metric of each cell, with its spread over the seeds.

If a setting with several values is a number, it is the horizontal axis, and every combination of
the other settings is a line. Otherwise each cell is a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_cli.files.atomic import atomic_file, report_write_errors
from qlora_cli.jobs.sweep_results import SweepCell, SweepResult
from qlora_cli.recipe.run_names import short_keys
from qlora_cli.ui.figures import as_png, hide_frame, new_figure
from qlora_cli.ui.sweep import metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_FROM = 8
"""Ratio of the largest and the smallest value from which on the horizontal axis is logarithmic."""
_NAME = "sweep.png"


def write(result: SweepResult) -> SweepResult:
    """Write sweep.png to the sweep's folder and return the result with its path.

    Raises QloraError if it cannot be written.
    """
    file = result.folder / _NAME
    with report_write_errors("the figure of the sweep", file), atomic_file(file) as partial:
        partial.write_bytes(as_png(sweep_figure(result)))
    return replace(result, plot=file)


def sweep_figure(result: SweepResult) -> Figure:
    """Draw the metric that compares the cells. At least one cell has it."""
    cells = [cell for cell in result.table if result.metric in cell.mean]
    number = _numeric_axis(result, cells)
    figure = new_figure(height=4.0 if number else 1.2 + 0.35 * len(cells))
    axes = figure.subplots()
    if number:
        _draw_lines(axes, result, cells, number)
    else:
        _draw_rows(axes, result, cells)
    axes.grid(color="#e3e7ec", linewidth=0.6)
    hide_frame(axes)
    return figure


def _numeric_axis(result: SweepResult, cells: Sequence[SweepCell]) -> str | None:
    """Return the setting with the most values of those that are numbers in every cell."""
    axes = [key for key in result.axes if all(_is_number(cell.settings.get(key)) for cell in cells)]
    sizes = {key: len({cell.settings[key] for cell in cells}) for key in axes}
    candidates = [key for key in axes if sizes[key] > 1]
    return max(candidates, key=lambda key: sizes[key], default=None)


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _draw_lines(axes: Axes, result: SweepResult, cells: Sequence[SweepCell], number: str) -> None:
    """Draw one line per combination of the settings other than `number`."""
    lines: dict[str, list[SweepCell]] = {}
    for cell in cells:
        lines.setdefault(_name(result, cell, without=number), []).append(cell)
    for name, members in lines.items():
        ordered = sorted(members, key=lambda cell: float(cell.settings[number]))
        positions = [float(cell.settings[number]) for cell in ordered]
        means = [cell.mean[result.metric] for cell in ordered]
        spreads = [cell.spread.get(result.metric, 0.0) for cell in ordered]
        axes.errorbar(positions, means, spreads, fmt="o-", capsize=3, label=name, linewidth=1.4)
    values = sorted({float(cell.settings[number]) for cell in cells})
    if values[0] > 0 and values[-1] / values[0] >= _LOG_FROM:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(number)
    axes.set_ylabel(metric_label(result.metric))
    if len(lines) > 1:
        axes.legend(loc="best", frameon=False, fontsize=8)


def _draw_rows(axes: Axes, result: SweepResult, cells: Sequence[SweepCell]) -> None:
    """Draw one row per cell."""
    means = [cell.mean[result.metric] for cell in cells]
    spreads = [cell.spread.get(result.metric, 0.0) for cell in cells]
    axes.errorbar(means, range(len(cells)), xerr=spreads, fmt="o", capsize=3)
    axes.set_yticks(range(len(cells)), [_name(result, cell) for cell in cells], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(metric_label(result.metric))


def _name(result: SweepResult, cell: SweepCell, without: str | None = None) -> str:
    """Return the settings of a cell in words: `rank 4, targets [q,v]`."""
    labels = short_keys(result.axes)
    parts = [f"{labels[key]} {cell.settings[key]}" for key in labels if key in cell.settings]
    own = labels.get(without or "")
    return ", ".join(part for part in parts if not own or not part.startswith(f"{own} ")) or "all"
