"""The figures of a run's report, as SVG text for the HTML page and as PNG bytes.

matplotlib is imported only when a figure is drawn. pyplot is not used, because it looks for a
display.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_cli.jobs.results import ReportResult
from qlora_cli.memory.ledger import CATEGORIES
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.ui import curves, memory, memory_facts, timelines
from qlora_cli.ui.categories import CATEGORY_STYLES
from qlora_cli.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 160


def bar_figure(bars: Mapping[str, Mapping[str, int]]) -> Figure:
    """Draw one horizontal bar per name, stacked by category, with the total at its end.

    bars: name -> bytes by category.
    """
    figure = new_figure(height=1.1 + 0.55 * len(bars))
    _draw_bars(figure.subplots(), bars)
    _legend(figure, _categories_of(bars))
    return figure


def step_figure(trace: PhaseTrace, planned_bytes: int) -> Figure:
    """Draw memory over one step.

    planned_bytes: the planned peak of the job, drawn as a line; 0 for none.
    """
    figure = new_figure(height=4.0)
    timelines.draw_step(figure.subplots(), trace, planned_bytes)
    _legend(figure, timelines.categories_of([trace]))
    return figure


def run_figure(result: ReportResult) -> Figure:
    """Draw memory over the run. `result.timeline` must have at least one trace."""
    figure = new_figure(height=4.0)
    _draw_run(figure.subplots(), result)
    _legend(figure, timelines.categories_of(result.timeline))
    return figure


def overview_figure(result: ReportResult) -> Figure:
    """Draw the peak of both methods, the step with the highest peak and the run in one figure.

    A run without timeline.json gets the first part only.
    """
    step = timelines.peak_step(result.timeline)
    heights = [1.5, *([3.2] if step else []), *([3.2] if result.timeline else [])]
    figure = new_figure(height=sum(heights) + 1.2)
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    bars = memory.peak_by_method(result.ledger)
    _title(panels[0], memory_facts.saving(result.ledger))
    _draw_bars(panels[0], bars)
    if step:
        _title(panels[1], f"The step with the highest peak: {timelines.trace_name(step)}")
        timelines.draw_step(panels[1], step, result.ledger.planned_peak_bytes)
    if result.timeline:
        _title(panels[-1], "The run")
        _draw_run(panels[-1], result)
    shown = {*_categories_of(bars), *timelines.categories_of(result.timeline)}
    _legend(figure, shown)
    return figure


def metric_figure(
    metrics: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    evaluations: Sequence[Mapping[str, Any]] = (),
    held_out_key: str = "eval_loss",
) -> Figure:
    """Draw one metric over the steps, with its held-out values if there are evaluations.

    metrics, evaluations: lines of metrics.jsonl. key, held_out_key: the metric in them. label: of
    the vertical axis.
    """
    figure = new_figure(height=2.6)
    axes = figure.subplots()
    curves.draw_metric(axes, metrics, key, label, evaluations, held_out_key)
    hide_frame(axes)
    return figure


def as_svg(figure: Figure) -> str:
    """Return the figure as SVG with text as text. The same run gives the same bytes."""
    from matplotlib import rc_context

    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qlora", "font.family": "sans-serif"}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=no_metadata, dpi=_DOTS_PER_INCH)
    return content.getvalue()


def as_png(figure: Figure) -> bytes:
    """Return the figure as PNG. The same run gives the same bytes.

    `report.check_can_write` recognizes the file by its metadata.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": "qlora"}, dpi=_DOTS_PER_INCH)
    return content.getvalue()


def _draw_run(axes: Axes, result: ReportResult) -> None:
    ledger = result.ledger
    has_counter = ledger.device.kind == "cuda"
    planned = ledger.planned_peak_bytes
    timelines.draw_run(axes, result.timeline, result.metrics, planned, has_counter)


def _draw_bars(axes: Axes, bars: Mapping[str, Mapping[str, int]]) -> None:
    ends = [0] * len(bars)
    for category, style in CATEGORY_STYLES.items():
        sizes = [at_peak.get(category, 0) for at_peak in bars.values()]
        axes.barh(
            range(len(bars)),
            sizes,
            left=ends,
            height=0.6,
            color=style.color,
            hatch=style.hatch,
            edgecolor="white",
            linewidth=0.6,
        )
        ends = [start + size for start, size in zip(ends, sizes, strict=True)]
    for row, total in enumerate(ends):
        axes.text(total, row, f" {format_bytes(total)}", va="center", ha="left", fontsize=9)
    names = [textwrap.fill(name, 16, break_on_hyphens=False) for name in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(*ends, 1) * 1.15)  # Leaves space for the totals at the ends of the bars.
    axes.xaxis.set_visible(False)
    hide_frame(axes)
    axes.spines["bottom"].set_visible(False)


def _categories_of(bars: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [c for c in CATEGORIES if any(at_peak.get(c) for at_peak in bars.values())]


def _legend(figure: Figure, categories: Iterable[str]) -> None:
    from matplotlib.patches import Patch

    shown = set(categories)
    patches = [
        Patch(facecolor=style.color, hatch=style.hatch, edgecolor="white", label=style.label)
        for category, style in CATEGORY_STYLES.items()
        if category in shown
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


def new_figure(height: float) -> Figure:
    """Return an empty figure of the common width. height: in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(8.0, height), layout="constrained")


def hide_frame(axes: Axes) -> None:
    """Leave the left and the lower line of the frame only."""
    for position, spine in axes.spines.items():
        spine.set_visible(position in ("left", "bottom"))
