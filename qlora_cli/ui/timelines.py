"""Memory over time, drawn: one step, and the whole run with its tracked stretches side by side.

A run of hours has seconds that were tracked; on one axis of time they could not be seen. So each
stretch gets the same width, says how long it took, and what was not tracked is a hatched gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qlora_cli.memory.ledger import CATEGORIES, STEP_PHASES
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.ui.memory import category_name
from qlora_cli.ui.shades import HATCHES, SHADES
from qlora_cli.units import GIB, KIB, MIB, format_bytes, format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOM = 1.32
"""Height of the axis, peaks being 1: for the words above them."""
_GAP = 0.85
"""Width of what was not tracked; a stretch is 1 wide."""
_MOST_UPRIGHT = 13
"""Parts of a run whose names fit side by side; those of more stand on end."""
_WORD = 0.1
"""Of the axes' width, for the longest word above it."""
_INK = "#1b2a41"
_PLAN = "#9c2f16"
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
"""Behind words, which lines and areas would cross."""


@dataclass(frozen=True)
class Gap:
    """Steps that were not tracked. peaks: bytes by the card's counter after each, if it has one."""

    first: int
    last: int
    seconds: float
    peaks: tuple[int, ...]


def worst_step(stretches: Sequence[PhaseTrace]) -> PhaseTrace | None:
    """The tracked step with the highest peak, the last of equals; None where none was tracked."""
    steps = [stretch for stretch in stretches if stretch.phase in STEP_PHASES]
    return max(reversed(steps), key=lambda stretch: stretch.peak_bytes, default=None)


def name(stretch: PhaseTrace) -> str:
    """`step 3`, `load`."""
    if stretch.step is None:
        return stretch.phase.replace("_", " ")
    return f"step {stretch.step:,}"


def shown_categories(stretches: Sequence[PhaseTrace]) -> list[str]:
    """Those that any stretch has, in the ledger's order."""
    return [name for name in CATEGORIES if any(name in stretch.bytes for stretch in stretches)]


def draw_step(axes: Axes, stretch: PhaseTrace, planned_bytes: int) -> None:
    """Bytes by category over one step; what it does stands above, each at its beginning."""
    start, end = stretch.seconds[0], stretch.seconds[-1]
    unit = _dress(axes, max(stretch.peak_bytes, planned_bytes))
    axes.set_xlim(0, max(end - start, 1e-6))
    axes.set_xlabel("seconds since the step began (the host's clock, instrument on)")
    _areas(axes, stretch, [moment - start for moment in stretch.seconds], unit)
    _marks(axes, [(moment - start, name) for moment, name in stretch.marks], end - start)
    at = stretch.totals.index(stretch.peak_bytes)
    share = (stretch.seconds[at] - start) / max(end - start, 1e-6)
    _peak(axes, stretch.seconds[at] - start, stretch.peak_bytes, unit, share)
    _plan(axes, planned_bytes, unit)


def draw_run(
    axes: Axes,
    stretches: Sequence[PhaseTrace],
    metrics: Sequence[Mapping[str, Any]],
    planned_bytes: int,
    has_counter: bool,
) -> None:
    """The tracked stretches one behind the other, and the gaps between them.

    has_counter: whether `peak_bytes` of metrics.jsonl is the card's counter.
    """
    parts = list(_parts(stretches, metrics, has_counter))
    highest = max(stretch.peak_bytes for stretch in stretches)
    counted = max(
        (peak for part in parts if isinstance(part, Gap) for peak in part.peaks), default=0
    )
    unit = _dress(axes, max(highest, planned_bytes, counted))
    left, middles, names = 0.0, [], []
    places: dict[int, tuple[float, float]] = {}
    for part in parts:
        width = _GAP if isinstance(part, Gap) else 1.0
        middles.append(left + width / 2)
        names.append(_name(part))
        if isinstance(part, Gap):
            _gap(axes, part, left, unit)
        else:
            moments = [left + share for share in _shares(part)]
            _areas(axes, part, moments, unit)
            places[id(part)] = (moments[part.totals.index(part.peak_bytes)], part.peak_bytes)
            axes.axvline(left, color=_INK, linewidth=0.5)
        left += width
    axes.set_xlim(0, left)
    _names(axes, middles, names)
    if any(isinstance(part, Gap) for part in parts):
        lines = "; lines: each step's peak by the card's own counter" if counted else ""
        axes.set_xlabel(f"hatched: steps that were not tracked{lines}", fontsize=8)
    at, peak = max(places.values(), key=lambda place: place[1])
    _peak(axes, at, int(peak), unit, at / left)
    _plan(axes, planned_bytes, unit)


def _names(axes: Axes, middles: Sequence[float], names: Sequence[str]) -> None:
    upright = len(names) <= _MOST_UPRIGHT
    shown = names if upright else [name.replace("\n", " ") for name in names]
    size = 7.5 if len(names) < 10 else 6.5
    axes.set_xticks(middles, shown, fontsize=size, rotation=0 if upright else 90)
    axes.tick_params(axis="x", length=0)


def _parts(
    stretches: Sequence[PhaseTrace], metrics: Sequence[Mapping[str, Any]], has_counter: bool
) -> Iterator[PhaseTrace | Gap]:
    """Stretches in order, and between them the steps that none of them shows.

    A process tracks its first steps; so what was not tracked before one that loads again was done
    by the process before it.
    """
    tracked = {stretch.step for stretch in stretches}
    waiting = [line for line in metrics if line["step"] not in tracked]
    for index, stretch in enumerate(stretches):
        numbers = (later.step for later in stretches[index:] if later.step is not None)
        limit = next(numbers, None)
        before = [line for line in waiting if limit is None or line["step"] < limit]
        if before:
            yield _untracked(before, has_counter)
        waiting = waiting[len(before) :]
        yield stretch
    if waiting:
        yield _untracked(waiting, has_counter)


def _untracked(lines: Sequence[Mapping[str, Any]], has_counter: bool) -> Gap:
    return Gap(
        first=lines[0]["step"],
        last=lines[-1]["step"],
        seconds=sum(line["tokens"] / line["tokens_per_second"] for line in lines),
        peaks=tuple(line["peak_bytes"] for line in lines) if has_counter else (),
    )


def _name(part: PhaseTrace | Gap) -> str:
    if isinstance(part, PhaseTrace):
        return f"{name(part)}\n{_duration(part.seconds[-1] - part.seconds[0])}"
    alone = part.first == part.last
    steps = f"step {part.first:,}" if alone else f"steps\n{part.first:,}-{part.last:,}"
    return f"{steps}\n{_duration(part.seconds)}"


def _duration(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def _shares(stretch: PhaseTrace) -> list[float]:
    """Each moment as a share of the stretch."""
    start, length = stretch.seconds[0], stretch.seconds[-1] - stretch.seconds[0]
    return [(moment - start) / length if length else 0.0 for moment in stretch.seconds]


def _areas(axes: Axes, stretch: PhaseTrace, moments: Sequence[float], unit: int) -> None:
    """One area a category, stacked in the ledger's order; what stays is at the bottom."""
    bottom = [0.0] * len(moments)
    for name in CATEGORIES:
        if name not in stretch.bytes:
            continue
        rows = zip(bottom, stretch.bytes[name], strict=True)
        top = [below + size / unit for below, size in rows]
        index = CATEGORIES.index(name)
        axes.fill_between(
            moments,
            bottom,
            top,
            step="post",
            label=category_name(name),
            facecolor=SHADES[index],
            edgecolor="white",
            hatch=HATCHES[index],
            linewidth=0.0,
            rasterized=True,  # Thousands of corners as paths would make a page of megabytes.
        )
        bottom = top
    axes.step(moments, bottom, where="post", color=_INK, linewidth=0.7, rasterized=True)


def _gap(axes: Axes, gap: Gap, left: float, unit: int) -> None:
    axes.axvspan(left, left + _GAP, facecolor="#f4f5f7", edgecolor="#d5dae1", hatch="///", lw=0)
    axes.axvline(left, color=_INK, linewidth=0.5)
    if gap.peaks:
        every = _GAP / len(gap.peaks)
        at = [left + every * (step + 0.5) for step in range(len(gap.peaks))]
        axes.plot(at, [peak / unit for peak in gap.peaks], "-", color=_INK, linewidth=1.4)


def _marks(axes: Axes, marks: Sequence[tuple[float, str]], length: float) -> None:
    """A line each with its word above; where words would meet, one line of text tells of all."""
    across = axes.get_xaxis_transform()
    for moment, _ in marks:
        axes.axvline(moment, color=_INK, linewidth=0.6, linestyle=(0, (3, 2)))
    if not _words_fit(marks, length):
        counted = Counter(word for _, word in marks)
        told = ", ".join(f"{number} x {word}" for word, number in counted.items())
        axes.text(0, 1.01, f"a line each: {told}", transform=across, fontsize=8, va="bottom")
        return
    for moment, word in marks:
        method_peak = "right" if moment / length + _WORD > 1 else "left"
        axes.text(moment, 1.01, word, transform=across, fontsize=8, ha=method_peak, va="bottom")


def _words_fit(marks: Sequence[tuple[float, str]], length: float) -> bool:
    """Each needs `_WORD` behind it, and the last one before it where it is too near the end."""
    places = [moment / length for moment, _ in marks] if length else []
    if places and places[-1] + _WORD > 1:
        places[-1] -= _WORD
    return all(b - a >= _WORD for a, b in pairwise(places)) if length else not marks


def _peak(axes: Axes, at: float, peak_bytes: int, unit: int, share: float) -> None:
    """Where the highest moment is, and how high; the words lean away from the nearer edge."""
    low, high = axes.get_xlim()
    aside = (high - low) * (0.03 if share < 0.5 else -0.03)
    axes.annotate(
        f"peak {format_bytes(peak_bytes)}",
        (at, peak_bytes / unit),
        (at + aside, axes.get_ylim()[1] * 0.94),
        ha="left" if share < 0.5 else "right",
        va="center",
        fontsize=9,
        fontweight="bold",
        bbox=_PAPER,
        arrowprops={"arrowstyle": "-|>", "color": _INK, "linewidth": 0.9, "shrinkB": 1},
    )


def _plan(axes: Axes, planned_bytes: int, unit: int) -> None:
    """The plan's peak as a line; its words stand in the margin, where nothing is drawn."""
    if not planned_bytes:
        return
    axes.axhline(planned_bytes / unit, color=_PLAN, linewidth=1.1, linestyle=(0, (6, 2, 1, 2)))
    axes.text(
        1.008,
        planned_bytes / unit,
        f"planned\npeak\n{format_bytes(planned_bytes)}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=8,
        color=_PLAN,
    )


def _dress(axes: Axes, highest: int) -> int:
    """Axis of bytes from 0 in a unit that suits; returns the unit."""
    unit, name = next(
        ((size, name) for size, name in ((GIB, "GiB"), (MIB, "MiB")) if highest >= size),
        (KIB, "KiB"),
    )
    axes.set_ylim(0, max(highest, 1) * _ROOM / unit)
    axes.set_ylabel(name)
    axes.grid(axis="y", color="#e3e7ec", linewidth=0.6)
    axes.set_axisbelow(True)
    for method_peak in ("top", "right"):
        axes.spines[method_peak].set_visible(False)
    return unit
