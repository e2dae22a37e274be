"""Figures of the report, for the page as SVG text and for the folder as a PNG.

matplotlib is imported when a figure is drawn; without pyplot, so that no display is looked for.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_cli.jobs.results import ReportResult
from qlora_cli.memory.ledger import CATEGORIES
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.ui import memory, timelines
from qlora_cli.ui.shades import HATCHES, SHADES
from qlora_cli.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHED_STEPS = 20
_DOTS_PER_INCH = 160


def stacked_bars(bars: Mapping[str, Mapping[str, int]]) -> Figure:
    """One horizontal bar a name, its bytes by category, the sum at its end."""
    figure = _figure(height=1.1 + 0.55 * len(bars))
    _bars(figure.subplots(), bars)
    _legend(
        figure, [c for c in CATEGORIES if any(method_peak.get(c) for method_peak in bars.values())]
    )
    return figure


def over_step(stretch: PhaseTrace, planned_bytes: int) -> Figure:
    """Memory over one step."""
    figure = _figure(height=4.0)
    timelines.draw_step(figure.subplots(), stretch, planned_bytes)
    _legend(figure, timelines.shown_categories([stretch]))
    return figure


def over_run(result: ReportResult) -> Figure:
    """Memory over the run's tracked stretches, of which there must be one."""
    figure = _figure(height=4.0)
    _run(figure.subplots(), result)
    _legend(figure, timelines.shown_categories(result.timeline))
    return figure


def poster(result: ReportResult) -> Figure:
    """Before and after, one step and the run in one picture; an older run has the first only."""
    step = timelines.worst_step(result.timeline)
    heights = [1.5, *([3.2] if step else []), *([3.2] if result.timeline else [])]
    figure = _figure(height=sum(heights) + 1.2)
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    sides = memory.by_side(result.ledger)
    _title(panels[0], memory.saving(result.ledger))
    _bars(panels[0], sides)
    if step:
        _title(panels[1], f"The step with the highest peak: {timelines.name(step)}")
        timelines.draw_step(panels[1], step, result.ledger.planned_peak_bytes)
    if result.timeline:
        _title(panels[-1], "The run")
        _run(panels[-1], result)
    timed = timelines.shown_categories(result.timeline)
    known = [
        c
        for c in CATEGORIES
        if c in timed or any(method_peak.get(c) for method_peak in sides.values())
    ]
    _legend(figure, known)
    return figure


def curve(metrics: Sequence[Mapping[str, Any]], key: str, label: str) -> Figure:
    """One figure of each step's line: every value as a dot, the mean of the last 20 as a line."""
    steps = [line["step"] for line in metrics]
    values = [line[key] for line in metrics]
    figure = _figure(height=2.6)
    axes = figure.subplots()
    axes.plot(steps, values, ".", color="#9aa5b1", markersize=4)
    axes.plot(steps, _smoothed(values), "-", color="#1b2a41", linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(color="#e3e7ec", linewidth=0.6)
    _frameless(axes)
    return figure


def as_svg(figure: Figure) -> str:
    """Its text stays text, and the same run gives the same file."""
    from matplotlib import rc_context

    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qlora", "font.family": "sans-serif"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=nothing, dpi=_DOTS_PER_INCH)
    return content.getvalue()


def as_png(figure: Figure) -> bytes:
    """The same run gives the same file. `report.check_free` looks for the metadata."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": "qlora"}, dpi=_DOTS_PER_INCH)
    return content.getvalue()


def _run(axes: Axes, result: ReportResult) -> None:
    ledger = result.ledger
    has_counter = ledger.device.kind == "cuda"
    planned = ledger.planned_peak_bytes
    timelines.draw_run(axes, result.timeline, result.metrics, planned, has_counter)


def _bars(axes: Axes, bars: Mapping[str, Mapping[str, int]]) -> None:
    left = [0] * len(bars)
    for index, category in enumerate(CATEGORIES):
        sizes = [at_peak.get(category, 0) for at_peak in bars.values()]
        axes.barh(
            range(len(bars)),
            sizes,
            left=left,
            height=0.6,
            color=SHADES[index],
            hatch=HATCHES[index],
            edgecolor="white",
            linewidth=0.6,
        )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {format_bytes(total)}", va="center", ha="left", fontsize=9)
    names = [textwrap.fill(name, 16, break_on_hyphens=False) for name in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(*left, 1) * 1.15)  # Room for the sums behind the bars.
    axes.xaxis.set_visible(False)
    _frameless(axes)
    axes.spines["bottom"].set_visible(False)


def _legend(figure: Figure, categories: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=SHADES[index], hatch=HATCHES[index], edgecolor="white", label=name)
        for index, name in ((CATEGORIES.index(c), memory.category_name(c)) for c in categories)
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=8,
        handlelength=2.4,
        handleheight=1.2,
    )


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", pad=16)


def _smoothed(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, i + 1 - _SMOOTHED_STEPS) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8.0, height), layout="constrained")


def _frameless(axes: Axes) -> None:
    for method_peak, spine in axes.spines.items():
        spine.set_visible(method_peak in ("left", "bottom"))
