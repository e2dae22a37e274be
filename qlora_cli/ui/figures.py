"""Figures of the report as SVG text.

Each is legible in greyscale: shades differ in lightness, and neighbours in hatching too.
matplotlib is imported when a figure is drawn; without pyplot, so that no display is looked for.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_cli.memory.ledger import CATEGORIES
from qlora_cli.ui.memory import category_name
from qlora_cli.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHADES = (
    "#1b2a41",
    "#8fb8de",
    "#3d5a80",
    "#cfe0f1",
    "#b4541a",
    "#f2b880",
    "#7d3c10",
    "#f7dfc4",
    "#4d7c5b",
    "#a9cfb0",
    "#6b6b6b",
)
_HATCHES = ("", "", "//", "", "", "||", "\\\\", "", "//", "", "--")
_SMOOTHED_STEPS = 20


def stacked_bars(bars: Mapping[str, Mapping[str, int]]) -> str:
    """One horizontal bar a name, its bytes by category, the sum at its end."""
    figure = _figure(height=1.1 + 0.55 * len(bars))
    axes = figure.subplots()
    shown = [c for c in CATEGORIES if any(at_peak.get(c) for at_peak in bars.values())]
    left = [0] * len(bars)
    for category in shown:
        index = CATEGORIES.index(category)
        sizes = [at_peak.get(category, 0) for at_peak in bars.values()]
        axes.barh(
            range(len(bars)),
            sizes,
            left=left,
            height=0.6,
            label=category_name(category),
            color=_SHADES[index],
            hatch=_HATCHES[index],
            edgecolor="white",
            linewidth=0.6,
        )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {format_bytes(total)}", va="center", ha="left", fontsize=9)
    _dress_bars(axes, list(bars), max(left, default=0))
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return _svg(figure)


def curve(metrics: Sequence[Mapping[str, Any]], key: str, label: str) -> str:
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
    return _svg(figure)


def _smoothed(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, i + 1 - _SMOOTHED_STEPS) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8.0, height), layout="constrained")


def _dress_bars(axes: Axes, names: Sequence[str], longest: int) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(longest, 1) * 1.15)  # Room for the sums behind the bars.
    axes.xaxis.set_visible(False)
    _frameless(axes)
    axes.spines["bottom"].set_visible(False)


def _frameless(axes: Axes) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    content = io.StringIO()
    # Text stays text, and the same run gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qlora", "font.family": "sans-serif"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=nothing)
    return content.getvalue()
