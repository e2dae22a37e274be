"""Figures of memory over time: they show what was recorded, and no label is cut off."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from qlora_cli.jobs.results import ReportResult
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.ui import figures, timelines
from qlora_cli.units import GIB
from tests.helpers import results

LOAD, FIRST, STEP, LARGEST = results.TIMELINE


def lines(*steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "tokens": 100, "tokens_per_second": 50.0, "peak_bytes": step}
        for step in steps
    ]


def shape(parts: Sequence[PhaseTrace | timelines.Gap]) -> list[Any]:
    """Return the names of the traces and (first, last) of the gaps."""
    return [
        (part.first, part.last) if isinstance(part, timelines.Gap) else timelines.trace_name(part)
        for part in parts
    ]


def test_untracked_steps_are_a_gap() -> None:
    metrics = lines(*range(1, 51))
    parts = list(timelines.split_run(results.TIMELINE, metrics, has_counter=True))
    assert shape(parts) == ["load", "step 1", "step 2", (3, 29), "step 30", (31, 50)]
    gap = parts[3]
    assert isinstance(gap, timelines.Gap)
    assert gap.seconds == pytest.approx(27 * 2)
    assert gap.peaks == tuple(range(3, 30))
    without_counter = list(timelines.split_run(results.TIMELINE, metrics, has_counter=False))
    assert all(part.peaks == () for part in without_counter if isinstance(part, timelines.Gap))


def test_steps_before_a_second_load_belong_to_the_previous_process() -> None:
    again = (*results.TIMELINE[:3], LOAD, replace(STEP, step=7), replace(LOAD, phase="eval"))
    parts = list(timelines.split_run(again, lines(*range(1, 10)), has_counter=False))
    expected = ["load", "step 1", "step 2", (3, 6), "load", "step 7", (8, 9), "eval"]
    assert shape(parts) == expected


def test_every_step_is_shown_once() -> None:
    for tracked in ((), (STEP,), results.TIMELINE):
        parts = list(timelines.split_run(tracked, lines(*range(1, 41)), has_counter=False))
        gaps = [part for part in parts if isinstance(part, timelines.Gap)]
        hidden = [step for gap in gaps for step in range(gap.first, gap.last + 1)]
        shown = [trace.step for trace in tracked if trace.step]
        assert sorted(hidden + shown) == list(range(1, 41))


def test_the_step_with_the_highest_peak_is_shown_and_never_the_load() -> None:
    higher = replace(FIRST, bytes=FIRST.bytes | {"other": [1] * len(FIRST.seconds)})
    assert timelines.peak_step((LOAD, higher, STEP)) is higher
    assert timelines.peak_step((LOAD, FIRST, STEP, LARGEST)) is LARGEST
    assert timelines.peak_step((LOAD,)) is None


def many_batches() -> PhaseTrace:
    """Return a step of sixteen micro-batches, whose labels do not fit above it."""
    end = STEP.seconds[-1] - STEP.seconds[0]
    words = [word for _ in range(16) for word in ("forward", "backward")] + ["update"]
    marks = [(STEP.seconds[0] + end * i / len(words), word) for i, word in enumerate(words)]
    return replace(STEP, step=12, marks=tuple(marks))


CASES: dict[str, ReportResult] = {
    "usual": results.REPORT,
    "peak at the very end": replace(
        results.REPORT,
        timeline=(
            LOAD,
            replace(STEP, bytes={"base": [GIB] * (len(STEP.seconds) - 1) + [7 * GIB]}),
        ),
        metrics=(),
    ),
    "resumed": replace(results.REPORT, timeline=results.TIMELINE * 2),
    "resumed many times": replace(results.REPORT, timeline=results.TIMELINE * 8),
    "many batches": replace(results.REPORT, timeline=(LOAD, many_batches())),
    "no step": replace(results.REPORT, timeline=(LOAD,)),
    "a planned peak far above": replace(
        results.REPORT, ledger=replace(results.LEDGER, planned_peak_bytes=200 * GIB)
    ),
}


def words_of(figure: Figure) -> Iterator[tuple[str, Bbox]]:
    """Yield each label that is drawn and its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown: list[Text] = [*figure.legends[0].get_texts()]
    for axes in figure.axes:
        shown += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks() if axis.get_visible() else []
            shown += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    for text in shown:
        if text.get_text():
            yield text.get_text(), text.get_window_extent(canvas.get_renderer())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_label_is_cut_off_or_overlaps_another(case: str) -> None:
    figure = figures.overview_figure(CASES[case])
    boxes = list(words_of(figure))
    assert len(boxes) > 15
    for words, box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width, words
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height, words
    for (words, box), (others, other) in itertools.combinations(boxes, 2):
        wide = min(box.x1, other.x1) - max(box.x0, other.x0)
        high = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(wide, high) <= 1, (words, others)


def heights(figure: Figure) -> list[float]:
    """Return the top of each drawn area."""
    return [
        float(path.vertices[:, 1].max())
        for collection in figure.axes[0].collections
        for path in collection.get_paths()
    ]


def test_the_areas_reach_the_peak_and_the_line_is_at_the_planned_peak() -> None:
    figure = figures.step_figure(LARGEST, 5 * GIB)
    assert max(heights(figure)) == pytest.approx(LARGEST.peak_bytes / GIB)
    assert 5.0 in {float(line.get_ydata()[0]) for line in figure.axes[0].lines}
