"""Each learning check warns about its seeded fault, and not about a run that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.data.encode import Example
from qlora_cli.data.packing import BatchSchedule
from qlora_cli.jobs.training_length import TrainingLength
from qlora_cli.train.learning_checks import LOSS_STEPS, ZERO_B_STEPS, LearningChecks
from qlora_cli.train.loss_spikes import LossSpikes
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome
from tests.helpers.runs import make_recipe
from tests.helpers.training import ROWS, example, make_state


def schedule_of(rows: list[Example], **settings: Any) -> BatchSchedule:
    defaults = {"seq_len": 32, "packing": True, "micro_batch": 1, "grad_accum": 1, "seed": 0}
    return BatchSchedule(rows, **{**defaults, **settings})


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    return make_state(tmp_path_factory.mktemp("state"))


def warnings_of(
    state: State, losses: list[float], norm: float = 1.0, skipped: bool = False
) -> list[str]:
    """Return the warnings after steps with these losses."""
    checks = LearningChecks(state, LossSpikes(state, schedule_of(ROWS)))
    warnings = []
    for step, loss in enumerate(losses, 1):
        state.step = step
        warnings += checks.after_step(StepOutcome(loss, norm, 100, skipped), 1e-4)
    return warnings


def test_a_run_that_learns_gets_no_warning(state: State) -> None:
    assert warnings_of(state, [3.0 - 0.01 * step for step in range(120)]) == []


@pytest.mark.parametrize(
    ("last", "cause"), [(3.0, "too low"), (5.0, "too high")], ids=["flat", "rising"]
)
def test_a_loss_that_does_not_fall(state: State, last: float, cause: str) -> None:
    losses = [3.0] * 10 + [last] * (LOSS_STEPS + 20)
    (warning,) = warnings_of(state, losses)
    assert "the loss does not fall" in warning
    assert cause in warning


def test_a_zero_gradient_is_reported_once(state: State) -> None:
    (warning,) = warnings_of(state, [3.0] * 6, norm=0.0)
    assert "the gradient has been zero" in warning


@pytest.mark.parametrize(
    ("skipped", "cause"), [(False, "raise train.lr"), (True, "float16 overflowed in every step")]
)
def test_an_untrained_b_is_reported(tmp_path: Path, skipped: bool, cause: str) -> None:
    state = make_state(tmp_path)
    with torch.no_grad():
        for name, parameter in state.trainable.items():
            if ".lora_b." in name:
                parameter.zero_()
    (warning,) = warnings_of(state, [3.0] * ZERO_B_STEPS, skipped=skipped)
    assert "B is still zero after 10 steps" in warning
    assert cause in warning


def length_of(rows: int, **train: float) -> TrainingLength:
    recipe = make_recipe(Path("base"), Path("rows"), train=train, data={"seq_len": 64})
    schedule = BatchSchedule(
        [example(40 * row, 30) for row in range(rows)],
        seq_len=64,
        packing=True,
        micro_batch=recipe.train.micro_batch,
        grad_accum=recipe.train.grad_accum,
        seed=0,
    )
    steps = recipe.train.steps or round(recipe.train.epochs * schedule.steps_per_epoch)
    return TrainingLength.of(recipe, schedule, steps)


def test_the_length_of_a_job_is_shown() -> None:
    length = length_of(40)
    assert length.text() == (
        "40 rows in 20 sequences; 3 updates of up to 8 sequences, 1 epoch; 1,200 tokens, 1,160 of "
        "them trained"
    )


def test_too_few_updates_are_a_warning_that_names_settings() -> None:
    warning = length_of(40).warning()
    assert warning is not None
    assert "only 3 updates" in warning
    assert "train.grad_accum=1 train.epochs=3: 60 updates" in warning
    advised = length_of(40, grad_accum=1, epochs=3.0)
    assert advised.updates == 60
    assert advised.warning() is None
    fixed = length_of(40, steps=4).warning()
    assert fixed is not None
    assert "train.steps=50" in fixed
