"""Memory over time, drawn: one step, and the whole run with its tracked stretches side by side.

A run of hours has seconds that were tracked; on one axis of time they could not be seen. So each
stretch gets the same width, says how long it took, and what was not tracked is a hatched gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_cli.memory.ledger import CATEGORIES, STEP_PHASES
from qlora_cli.memory.timeline import Stretch
from qlora_cli.ui.memory import category_name
from qlora_cli.ui.shades import HATCHES, SHADES
from qlora_cli.units import GIB, KIB, MIB, format_bytes, format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOM = 1.32
"""Height of the axis, peaks being 1: for the words above them."""
_GAP = 0.75
"""Width of what was not tracked; a stretch is 1 wide."""
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


def worst_step(stretches: Sequence[Stretch]) -> Stretch | None:
    """The tracked step with the highest peak, the last of equals; None where none was tracked."""
    steps = [stretch for stretch in stretches if stretch.phase in STEP_PHASES]
    return max(reversed(steps), key=lambda stretch: stretch.peak_bytes, default=None)


def name(stretch: Stretch) -> str:
    """`step 3`, `load`."""
    if stretch.step is None:
        return stretch.phase.replace("_", " ")
    return f"step {stretch.step:,}"


def shown_categories(stretches: Sequence[Stretch]) -> list[str]:
    """Those that any stretch has, in the ledger's order."""
    return [name for name in CATEGORIES if any(name in stretch.bytes for stretch in stretches)]


def draw_step(axes: Axes, stretch: Stretch, planned_bytes: int) -> None:
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
    _plan(axes, planned_bytes, unit, share)


def draw_run(
    axes: Axes,
    stretches: Sequence[Stretch],
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
    axes.set_xticks(middles, names, fontsize=7.5)
    axes.tick_params(axis="x", length=0)
    at, peak = max(places.values(), key=lambda place: place[1])
    _peak(axes, at, int(peak), unit, at / left)
    _plan(axes, planned_bytes, unit, at / left)


def _parts(
    stretches: Sequence[Stretch], metrics: Sequence[Mapping[str, Any]], has_counter: bool
) -> Iterator[Stretch | Gap]:
    """Stretches in order, and between them the steps that none of them shows."""
    tracked = {stretch.step for stretch in stretches if stretch.step is not None}
    lines = [line for line in metrics if line["step"] not in tracked]
    done = 0
    for stretch in stretches:
        before = [line for line in lines if done < line["step"] < (stretch.step or 0)]
        if stretch.phase not in (*STEP_PHASES, "load"):
            # Whatever follows the steps follows all of them.
            before = [line for line in lines if line["step"] > done]
        if before:
            yield _untracked(before, has_counter)
        done = max([done, stretch.step or 0, *(line["step"] for line in before)])
        yield stretch
    after = [line for line in lines if line["step"] > done]
    if after:
        yield _untracked(after, has_counter)


def _untracked(lines: Sequence[Mapping[str, Any]], has_counter: bool) -> Gap:
    return Gap(
        first=lines[0]["step"],
        last=lines[-1]["step"],
        seconds=sum(line["tokens"] / line["tokens_per_second"] for line in lines),
        peaks=tuple(line["peak_bytes"] for line in lines) if has_counter else (),
    )


def _name(part: Stretch | Gap) -> str:
    if isinstance(part, Stretch):
        return f"{name(part)}\n{_duration(part.seconds[-1] - part.seconds[0])}"
    alone = part.first == part.last
    steps = f"step {part.first:,}" if alone else f"steps {part.first:,}-{part.last:,}"
    return f"{steps}\n{_duration(part.seconds)}"


def _duration(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def _shares(stretch: Stretch) -> list[float]:
    """Each moment as a share of the stretch."""
    start, length = stretch.seconds[0], stretch.seconds[-1] - stretch.seconds[0]
    return [(moment - start) / length if length else 0.0 for moment in stretch.seconds]


def _areas(axes: Axes, stretch: Stretch, moments: Sequence[float], unit: int) -> None:
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
        axes.plot(at, [peak / unit for peak in gap.peaks], "-", color=_INK, linewidth=1.2)
    axes.text(
        left + _GAP / 2,
        0.04,
        "not tracked;\npeaks by counter" if gap.peaks else "not\ntracked",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=7,
        color="#4a5768",
        bbox=_PAPER,
    )


def _marks(axes: Axes, marks: Sequence[tuple[float, str]], length: float) -> None:
    """A line each; a word only where the one before it leaves room."""
    free_from = -1.0
    for moment, word in marks:
        axes.axvline(moment, color=_INK, linewidth=0.6, linestyle=(0, (3, 2)))
        share = moment / max(length, 1e-6)
        if share < free_from:
            continue
        width = 0.012 * (len(word) + 1)
        side = "right" if share + width > 1 else "left"
        across = axes.get_xaxis_transform()
        axes.text(moment, 1.01, word, transform=across, fontsize=8, ha=side, va="bottom")
        free_from = share + width


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


def _plan(axes: Axes, planned_bytes: int, unit: int, peak_share: float) -> None:
    """The plan's peak as a line; its words stand at the side where the peak's are not."""
    if not planned_bytes:
        return
    axes.axhline(planned_bytes / unit, color=_PLAN, linewidth=1.1, linestyle=(0, (6, 2, 1, 2)))
    at, side = (0.995, "right") if peak_share < 0.5 else (0.005, "left")
    axes.annotate(
        f"planned peak {format_bytes(planned_bytes)}",
        (at, planned_bytes / unit),
        (0, 3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=8,
        color=_PLAN,
        bbox=_PAPER,
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
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return unit
