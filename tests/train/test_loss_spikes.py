"""A loss far above those before it is reported once, with its rows; usual noise is not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qlora_cli.data.packing import BatchSchedule
from qlora_cli.jobs import train
from qlora_cli.train.loss_spikes import LossSpikes
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import make_base, make_recipe, make_rows
from tests.helpers.training import ROWS, make_state


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    return make_state(tmp_path_factory.mktemp("state"))


def warnings_of(state: State, losses: list[float], skipped: bool = False) -> list[str]:
    schedule = BatchSchedule(ROWS, seq_len=64, packing=True, micro_batch=1, grad_accum=2, seed=0)
    spikes, warnings = LossSpikes(state, schedule), []
    for step, loss in enumerate(losses, 1):
        state.step = step
        warnings += spikes.after_step(StepOutcome(loss, 1.0, 100, skipped))
    return warnings


def test_a_spike_is_reported_once(state: State) -> None:
    (warning,) = warnings_of(state, [5.2] * 30 + [17.5, 16.0, 15.0] + [5.3] * 30)
    assert warning.startswith("warning: step 31: the loss rose to 17.5; its mean over the 20 steps")
    assert "is 5.2. Rows with the highest loss: row " in warning
    assert "lower train.lr" in warning


def test_a_second_spike_is_reported(state: State) -> None:
    assert len(warnings_of(state, [5.0] * 9 + [17.5] + [5.0] * 3 + [18.0])) == 2


def test_a_loss_that_stays_high_is_reported_once(state: State) -> None:
    assert len(warnings_of(state, [5.0] * 30 + [17.5] * 100)) == 1


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("last", [4.0, 1.0, 0.05])
def test_usual_noise_is_not_reported(state: State, spread: float, last: float) -> None:
    """Losses of single rows that fall from 5 to `last`, and differ by factors."""
    noise = random.Random(0)
    means = [last + (5.0 - last) * 0.98**step for step in range(1000)]
    assert warnings_of(state, [mean * noise.lognormvariate(0, spread) for mean in means]) == []


def test_a_skipped_step_is_no_spike(state: State) -> None:
    assert warnings_of(state, [5.0] * 30 + [17.5], skipped=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("row", [45, None])
def test_the_row_of_a_spike_is_named(tmp_path: Path, row: int | None) -> None:
    """One row of characters that the others do not have; without it there is no warning."""
    rows = make_rows(tmp_path / "rows.jsonl", num=60)
    lines = ['{"text": "abababababababab"}'] * 60
    if row is not None:
        lines[row - 1] = json.dumps({"text": "Zq!9#{XwJ@%K7^&*"})
    rows.write_text("\n".join(lines) + "\n")
    base = make_base(tmp_path / "base", "llama", spread=0.1)
    settings = {"micro_batch": 1, "grad_accum": 1, "epochs": 1.0, "lr": 1e-2, "warmup": 0.1}
    recipe = make_recipe(base, rows, data={"packing": False, "eval": None}, train=settings)
    recorder = NoteRecorder()
    output = recipe.model_copy(update={"output": str(tmp_path / "run")})
    train.run(output, recipe_path=None, resume=False, observer=recorder, allow=["duplicates"])
    found = [note for note in recorder.notes if "the loss rose" in note]
    assert len(found) == (row is not None)
    if row is not None:
        assert f"Rows with the highest loss: {rows.name}:{row} (" in found[0]
