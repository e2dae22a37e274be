"""Drawings of memory over time: one step, and the complete run.

Only a few seconds of a run of hours are tracked. On one time axis they would be invisible. In the
figure of the run every trace therefore has the same width, with its duration below it, and the
steps between two traces are a hatched gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qlora_cli.memory.ledger import CATEGORIES, STEP_PHASES
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.ui.categories import CATEGORY_STYLES
from qlora_cli.units import GIB, KIB, MIB, format_bytes, format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADROOM = 1.32
"""Height of the vertical axis relative to the highest value; labels are in the space above."""
_GAP_WIDTH = 0.85
"""Width of a gap; the width of a trace is 1."""
_MAX_HORIZONTAL_NAMES = 13
"""Parts of a run whose names fit next to each other. With more parts, the names are vertical."""
_LABEL_WIDTH = 0.1
"""Width of the longest label of a mark, as a share of the axis."""
_LINE_COLOR = "#1b2a41"
_PLAN_COLOR = "#9c2f16"
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
"""Background of labels that lines and areas would cross."""


@dataclass(frozen=True)
class Gap:
    """Consecutive steps that were not tracked.

    first, last: numbers of the steps. seconds: their duration. peaks: the peak of each step in
    bytes by the GPU's own counter; empty if the device has none.
    """

    first: int
    last: int
    seconds: float
    peaks: tuple[int, ...]


def peak_step(traces: Sequence[PhaseTrace]) -> PhaseTrace | None:
    """Return the tracked step with the highest peak, the last one of equals; None if none is."""
    steps = [trace for trace in traces if trace.phase in STEP_PHASES]
    return max(reversed(steps), key=lambda trace: trace.peak_bytes, default=None)


def trace_name(trace: PhaseTrace) -> str:
    """Return `step 3` or, for a phase without a step number, the phase: `load`."""
    if trace.step is None:
        return trace.phase.replace("_", " ")
    return f"step {trace.step:,}"


def categories_of(traces: Sequence[PhaseTrace]) -> list[str]:
    """Return the categories that occur in any trace, in the ledger's order."""
    return [category for category in CATEGORIES if any(category in t.bytes for t in traces)]


def draw_step(axes: Axes, trace: PhaseTrace, planned_bytes: int) -> None:
    """Draw bytes by category over one step, with a label where each part of the step begins.

    planned_bytes: planned peak of the job, drawn as a line; 0 for none.
    """
    start, end = trace.seconds[0], trace.seconds[-1]
    unit = _set_up_axes(axes, max(trace.peak_bytes, planned_bytes))
    axes.set_xlim(0, max(end - start, 1e-6))
    axes.set_xlabel("seconds since the start of the step (CPU clock, with memory tracking on)")
    _draw_areas(axes, trace, [moment - start for moment in trace.seconds], unit)
    _draw_marks(axes, [(moment - start, name) for moment, name in trace.marks], end - start)
    at = trace.totals.index(trace.peak_bytes)
    share = (trace.seconds[at] - start) / max(end - start, 1e-6)
    _draw_peak(axes, trace.seconds[at] - start, trace.peak_bytes, unit, share)
    _draw_plan(axes, planned_bytes, unit)


def draw_run(
    axes: Axes,
    traces: Sequence[PhaseTrace],
    metrics: Sequence[Mapping[str, Any]],
    planned_bytes: int,
    has_counter: bool,
) -> None:
    """Draw the traces of a run in order, and the gaps between them.

    metrics: lines of metrics.jsonl. planned_bytes: planned peak, drawn as a line; 0 for none.
    has_counter: whether `peak_bytes` in metrics.jsonl comes from the GPU's own counter.
    """
    parts = list(split_run(traces, metrics, has_counter))
    counted = max(
        (peak for part in parts if isinstance(part, Gap) for peak in part.peaks), default=0
    )
    highest = max(trace.peak_bytes for trace in traces)
    unit = _set_up_axes(axes, max(highest, planned_bytes, counted))
    left, middles = 0.0, []
    peaks: list[tuple[int, float]] = []
    for part in parts:
        width = _GAP_WIDTH if isinstance(part, Gap) else 1.0
        middles.append(left + width / 2)
        if isinstance(part, Gap):
            _draw_gap(axes, part, left, unit)
        else:
            moments = [left + share for share in _shares(part)]
            _draw_areas(axes, part, moments, unit)
            axes.axvline(left, color=_LINE_COLOR, linewidth=0.5)
            peaks.append((part.peak_bytes, moments[part.totals.index(part.peak_bytes)]))
        left += width
    axes.set_xlim(0, left)
    _label_parts(axes, middles, [_part_label(part) for part in parts])
    if any(isinstance(part, Gap) for part in parts):
        line = "; line in a gap: each step's peak by the GPU's counter" if counted else ""
        axes.set_xlabel(f"hatched: steps without memory tracking{line}", fontsize=8)
    peak_bytes, at = max(peaks, key=lambda peak: peak[0])
    _draw_peak(axes, at, peak_bytes, unit, at / left)
    _draw_plan(axes, planned_bytes, unit)


def split_run(
    traces: Sequence[PhaseTrace], metrics: Sequence[Mapping[str, Any]], has_counter: bool
) -> Iterator[PhaseTrace | Gap]:
    """Yield the traces in order and, between them, a gap for the steps that no trace shows.

    A process tracks its first steps. Untracked steps before a trace that loads the base again were
    therefore done by the previous process.
    """
    tracked = {trace.step for trace in traces}
    waiting = [line for line in metrics if line["step"] not in tracked]
    for index, trace in enumerate(traces):
        next_steps = (later.step for later in traces[index:] if later.step is not None)
        limit = next(next_steps, None)
        before = [line for line in waiting if limit is None or line["step"] < limit]
        if before:
            yield _gap(before, has_counter)
        waiting = waiting[len(before) :]
        yield trace
    if waiting:
        yield _gap(waiting, has_counter)


def _gap(lines: Sequence[Mapping[str, Any]], has_counter: bool) -> Gap:
    return Gap(
        first=lines[0]["step"],
        last=lines[-1]["step"],
        seconds=sum(line["tokens"] / line["tokens_per_second"] for line in lines),
        peaks=tuple(line["peak_bytes"] for line in lines) if has_counter else (),
    )


def _label_parts(axes: Axes, middles: Sequence[float], labels: Sequence[str]) -> None:
    horizontal = len(labels) <= _MAX_HORIZONTAL_NAMES
    shown = labels if horizontal else [label.replace("\n", " ") for label in labels]
    size = 7.5 if len(labels) < 10 else 6.5
    axes.set_xticks(middles, shown, fontsize=size, rotation=0 if horizontal else 90)
    axes.tick_params(axis="x", length=0)


def _part_label(part: PhaseTrace | Gap) -> str:
    if isinstance(part, PhaseTrace):
        return f"{trace_name(part)}\n{_duration(part.seconds[-1] - part.seconds[0])}"
    single = part.first == part.last
    steps = f"step {part.first:,}" if single else f"steps\n{part.first:,}-{part.last:,}"
    return f"{steps}\n{_duration(part.seconds)}"


def _duration(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def _shares(trace: PhaseTrace) -> list[float]:
    """Return each moment as a share of the trace's duration, from 0 to 1."""
    start, length = trace.seconds[0], trace.seconds[-1] - trace.seconds[0]
    return [(moment - start) / length if length else 0.0 for moment in trace.seconds]


def _draw_areas(axes: Axes, trace: PhaseTrace, moments: Sequence[float], unit: int) -> None:
    """Draw one area per category, stacked in the ledger's order."""
    bottom = [0.0] * len(moments)
    for category, style in CATEGORY_STYLES.items():
        if category not in trace.bytes:
            continue
        rows = zip(bottom, trace.bytes[category], strict=True)
        top = [below + size / unit for below, size in rows]
        axes.fill_between(
            moments,
            bottom,
            top,
            step="post",
            label=style.label,
            facecolor=style.color,
            edgecolor="white",
            hatch=style.hatch,
            linewidth=0.0,
            rasterized=True,  # As vector paths, thousands of corners would take megabytes.
        )
        bottom = top
    axes.step(moments, bottom, where="post", color=_LINE_COLOR, linewidth=0.7, rasterized=True)


def _draw_gap(axes: Axes, gap: Gap, left: float, unit: int) -> None:
    right = left + _GAP_WIDTH
    axes.axvspan(left, right, facecolor="#f4f5f7", edgecolor="#d5dae1", hatch="///", lw=0)
    axes.axvline(left, color=_LINE_COLOR, linewidth=0.5)
    if gap.peaks:
        width = _GAP_WIDTH / len(gap.peaks)
        at = [left + width * (step + 0.5) for step in range(len(gap.peaks))]
        axes.plot(at, [peak / unit for peak in gap.peaks], "-", color=_LINE_COLOR, linewidth=1.4)


def _draw_marks(axes: Axes, marks: Sequence[tuple[float, str]], length: float) -> None:
    """Draw a vertical line at each mark, labelled; one summary line if the labels do not fit."""
    transform = axes.get_xaxis_transform()
    for moment, _ in marks:
        axes.axvline(moment, color=_LINE_COLOR, linewidth=0.6, linestyle=(0, (3, 2)))
    if not _labels_fit(marks, length):
        counts = Counter(label for _, label in marks)
        summary = ", ".join(f"{number} x {label}" for label, number in counts.items())
        text = f"vertical lines: {summary}"
        axes.text(0, 1.01, text, transform=transform, fontsize=8, va="bottom")
        return
    for moment, label in marks:
        align = "right" if moment / length + _LABEL_WIDTH > 1 else "left"
        axes.text(moment, 1.01, label, transform=transform, fontsize=8, ha=align, va="bottom")


def _labels_fit(marks: Sequence[tuple[float, str]], length: float) -> bool:
    """Return whether the labels have `_LABEL_WIDTH` each.

    A label is to the right of its mark; the last one is to the left if it is too near the end.
    """
    places = [moment / length for moment, _ in marks] if length else []
    if places and places[-1] + _LABEL_WIDTH > 1:
        places[-1] -= _LABEL_WIDTH
    return all(b - a >= _LABEL_WIDTH for a, b in pairwise(places)) if length else not marks


def _draw_peak(axes: Axes, at: float, peak_bytes: int, unit: int, share: float) -> None:
    """Label the highest point with its size, on the side away from the nearer edge.

    at: horizontal position. share: the same as a share of the axis.
    """
    low, high = axes.get_xlim()
    offset = (high - low) * (0.03 if share < 0.5 else -0.03)
    axes.annotate(
        f"peak {format_bytes(peak_bytes)}",
        (at, peak_bytes / unit),
        (at + offset, axes.get_ylim()[1] * 0.94),
        ha="left" if share < 0.5 else "right",
        va="center",
        fontsize=9,
        fontweight="bold",
        bbox=_LABEL_BOX,
        arrowprops={"arrowstyle": "-|>", "color": _LINE_COLOR, "linewidth": 0.9, "shrinkB": 1},
    )


def _draw_plan(axes: Axes, planned_bytes: int, unit: int) -> None:
    """Draw the planned peak as a line; its label is in the margin, where nothing is drawn."""
    if not planned_bytes:
        return
    height, dashes = planned_bytes / unit, (0, (6, 2, 1, 2))
    axes.axhline(height, color=_PLAN_COLOR, linewidth=1.1, linestyle=dashes)
    axes.text(
        1.008,
        height,
        f"planned\npeak\n{format_bytes(planned_bytes)}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=8,
        color=_PLAN_COLOR,
    )


def _set_up_axes(axes: Axes, highest_bytes: int) -> int:
    """Set up the vertical axis from 0 to above `highest_bytes`; return its unit in bytes."""
    unit, name = next(
        ((size, name) for size, name in ((GIB, "GiB"), (MIB, "MiB")) if highest_bytes >= size),
        (KIB, "KiB"),
    )
    axes.set_ylim(0, max(highest_bytes, 1) * _HEADROOM / unit)
    axes.set_ylabel(name)
    axes.grid(axis="y", color="#e3e7ec", linewidth=0.6)
    axes.set_axisbelow(True)
    for position in ("top", "right"):
        axes.spines[position].set_visible(False)
    return unit
