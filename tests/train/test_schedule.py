"""The learning rate's warm-up and schedules."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.recipe.schema import Train
from qlora_cli.train.schedule import learning_rate


def rates(schedule: Any, warmup: float, steps: int) -> list[float]:
    train = Train(lr=1.0, schedule=schedule, warmup=warmup)
    return [learning_rate(train, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak_in_equal_steps(schedule: Any) -> None:
    found = rates(schedule, 0.1, 100)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == 1.0
    assert max(found) == 1.0


def test_cosine_decreases_to_zero() -> None:
    found = rates("cosine", 0.0, 100)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 1e-3
    assert learning_rate(Train(lr=1.0, warmup=0.0), 100, 100) == pytest.approx(0.0)


def test_linear_decreases_in_equal_steps_and_constant_does_not() -> None:
    assert rates("linear", 0.0, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates("constant", 0.25, 4) == pytest.approx([1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
def test_every_step_has_a_positive_rate(schedule: Any, steps: int, warmup: float) -> None:
    assert all(0 < rate <= 1 for rate in rates(schedule, warmup, steps))
