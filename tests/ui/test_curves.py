"""The curves of a run: the smoothed one does not lag, steps are whole, held-out loss is drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_cli.ui.curves import draw_metric, smooth


def drawn(steps: int, evaluations: tuple[dict[str, Any], ...] = ()) -> Axes:
    axes = Figure().subplots()
    metrics = [{"step": step, "loss": 5 / step} for step in range(1, steps + 1)]
    draw_metric(axes, metrics, "loss", "nats per token", evaluations)
    axes.figure.canvas.draw()
    return axes


def test_the_smoothed_curve_does_not_lag_behind_a_falling_loss() -> None:
    losses = [5 * math.exp(-step / 4) for step in range(20)]
    for loss, mean in zip(losses, smooth(losses), strict=True):
        assert mean == pytest.approx(loss, rel=0.15)


def test_the_smoothed_curve_of_a_straight_line_is_that_line() -> None:
    line = [float(value) for value in range(200)]
    assert smooth(line)[10:-10] == line[10:-10]


@pytest.mark.parametrize("count", [1, 2, 19, 20, 500])
def test_every_step_has_a_smoothed_value_within_the_range(count: int) -> None:
    noisy = [1.0 + (-1) ** step for step in range(count)]
    means = smooth(noisy)
    assert len(means) == count
    assert all(0 <= mean <= 2 for mean in means)
    if count >= 100:
        assert max(means) - min(means) < 0.5


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 1000])
def test_the_axis_shows_whole_steps(steps: int) -> None:
    ticks = drawn(steps).get_xticks()
    assert all(tick == round(tick) for tick in ticks)


def test_the_held_out_loss_is_drawn_from_before_training() -> None:
    evaluations = ({"step": 0, "eval_loss": 5.1}, {"step": 5, "eval_loss": 0.9})
    axes = drawn(5, evaluations)
    (line,) = [line for line in axes.lines if line.get_label() == "held-out set"]
    assert list(line.get_xdata()) == [0, 5]
    assert list(line.get_ydata()) == [5.1, 0.9]
    assert "held-out set" not in {line.get_label() for line in drawn(5).lines}
