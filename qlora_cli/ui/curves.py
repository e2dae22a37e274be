"""The figures of metrics.jsonl: one value over the training steps.

matplotlib is imported by the caller; see `ui/figures.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_RADIUS = 10
"""Largest number of steps on each side of a step that its mean includes."""
_STEPS_PER_RADIUS = 20
"""A run of this many steps has a radius of 1."""
_VALUE_COLOR = "#9aa5b1"
_MEAN_COLOR = "#1b2a41"
_HELD_OUT_COLOR = "#c76a2e"


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours on both sides.

    A mean of earlier values only would lag behind a falling loss. The neighbours are at most 5 % of
    the values on each side, and at most 10; at the ends there are fewer.
    """
    radius = min(_MAX_RADIUS, len(values) // _STEPS_PER_RADIUS)
    windows = (values[max(0, at - radius) : at + radius + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_metric(
    axes: Axes,
    metrics: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    evaluations: Sequence[Mapping[str, Any]] = (),
    held_out_key: str = "eval_loss",
) -> None:
    """Draw one metric over the steps: values as dots, their smoothed curve, the held-out loss.

    metrics: the lines of metrics.jsonl of steps. key: the metric. label: of the vertical axis.
    evaluations: the lines of metrics.jsonl of evaluations, drawn as a second curve. held_out_key:
    of the metric in them.
    """
    from matplotlib.ticker import MaxNLocator

    steps = [line["step"] for line in metrics]
    values = [line[key] for line in metrics]
    axes.plot(steps, values, ".", color=_VALUE_COLOR, markersize=4, label="each step")
    axes.plot(steps, smooth(values), "-", color=_MEAN_COLOR, linewidth=1.6, label="smoothed")
    if evaluations:
        axes.plot(
            [line["step"] for line in evaluations],
            [line[held_out_key] for line in evaluations],
            "o--",
            color=_HELD_OUT_COLOR,
            linewidth=1.4,
            markersize=5,
            label="held-out set",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(color="#e3e7ec", linewidth=0.6)
    axes.legend(loc="best", frameon=False, fontsize=8)
