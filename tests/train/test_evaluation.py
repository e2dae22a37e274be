"""Evaluations during training: when, which weights are exported, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Interrupted, UsageError
from qlora_cli.events import Silent
from qlora_cli.jobs import evaluate, merge, train, verify
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import (
    Evaluation,
    best_evaluation,
    read_evaluations,
    remove_lines_after,
)
from qlora_cli.runs.run import Run
from qlora_cli.train.schedule import steps_between
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import STEPS, assert_same_run, losses, make_bases, recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama")


@pytest.fixture(scope="module")
def evaluated(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with an evaluation after every second step of 5."""
    output = tmp_path_factory.mktemp("evaluated") / "run"
    return train_run(recipe_of(bases, output, train={"eval_every": 2}))


def set_losses(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Replace the held-out losses by `values`: step -> loss."""
    from qlora_cli.train import evaluation

    real = evaluation.Evaluator._score

    def replaced(self: Any, is_stop_requested: Any) -> Any:
        score = real(self, is_stop_requested)
        return type(score)(values[self.state.step], score.num_targets, score.metrics)

    monkeypatch.setattr(evaluation.Evaluator, "_score", replaced)


def test_it_evaluates_before_during_and_after_training(evaluated: RunFolder) -> None:
    assert [item.step for item in read_evaluations(evaluated.metrics)] == [0, 2, 4, 5]
    assert [line[0] for line in losses(evaluated)] == list(range(1, STEPS + 1))


def test_training_is_the_same_without_evaluation(
    evaluated: RunFolder, bases: Path, tmp_path: Path
) -> None:
    plain = train_run(recipe_of(bases, tmp_path / "run", data={"eval": None}))
    assert read_evaluations(plain.metrics) == []
    assert losses(plain) == losses(evaluated)
    file = "checkpoints/step-000005/trained.safetensors"
    assert (plain.path / file).read_bytes() == (evaluated.path / file).read_bytes()


def test_a_resumed_run_evaluates_as_an_uninterrupted_one(
    evaluated: RunFolder, bases: Path, tmp_path: Path
) -> None:
    """Ctrl-C after step 2 skips the evaluation that is due there; the resumed run does it."""
    recipe = recipe_of(bases, tmp_path / "run", train={"eval_every": 2})
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    run = RunFolder(tmp_path / "run")
    assert [item.step for item in read_evaluations(run.metrics)] == [0]
    train_run(recipe, resume=True)
    assert_same_run(run, evaluated)
    assert read_evaluations(run.metrics) == read_evaluations(evaluated.metrics)


def test_the_best_step_is_exported(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_losses(monkeypatch, {0: 0.5, 1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0})
    settings = {"eval_every": 1, "keep_checkpoints": 1}
    recipe = recipe_of(bases, tmp_path / "run", train=settings)
    result = train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    run = RunFolder(tmp_path / "run")
    assert (result.best_step, result.eval_loss, result.eval_loss_before) == (2, 1.0, 0.5)
    assert run.steps() == [2, 5], "neither the best nor the last checkpoint is removed"
    file = "adapter_model.safetensors"
    assert (run.adapter / file).read_bytes() == (run.checkpoint(2) / "adapter" / file).read_bytes()
    assert (run.adapter / file).read_bytes() != (run.checkpoint(5) / "adapter" / file).read_bytes()


def test_the_last_step_is_exported_without_keep_best(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_losses(monkeypatch, {0: 0.5, 2: 1.0, 4: 2.0, 5: 2.5})
    recipe = recipe_of(bases, tmp_path / "run", train={"eval_every": 2, "keep_best": False})
    result = train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    assert (result.best_step, result.eval_loss) == (5, 2.5)
    assert RunFolder(tmp_path / "run").steps() == [5]


def test_training_stops_without_improvement(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_losses(monkeypatch, {0: 0.5, 1: 1.0, 2: 1.1, 3: 1.2, 4: 0.9, 5: 0.8})
    recipe = recipe_of(bases, tmp_path / "run", train={"eval_every": 1, "patience": 2})
    result = train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    assert (result.steps, result.best_step) == (3, 1)
    assert RunFolder(tmp_path / "run").read()["status"] == "done"
    again = train.run(recipe, recipe_path=None, resume=True, observer=Silent())
    assert again.steps == 3


def test_old_checkpoints_are_removed(bases: Path, tmp_path: Path) -> None:
    settings = {"checkpoint_every": 1, "keep_checkpoints": 2}
    recipe = recipe_of(bases, tmp_path / "run", train=settings, data={"eval": None})
    assert train_run(recipe).steps() == [4, 5]


@pytest.fixture(scope="module")
def stopped(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder]:
    """A run of 5 steps that was stopped after step 3, with checkpoints after each step."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    recipe = recipe_of(bases, output, train={"checkpoint_every": 1, "eval_every": 2})
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=3)
    return recipe, RunFolder(output)


def test_a_stopped_run_can_be_merged_and_verified(
    stopped: tuple[Recipe, RunFolder], tmp_path: Path
) -> None:
    _, run = stopped
    assert Run(run.path).trained_step == 2, "the only step that was evaluated"
    assert Run(run.path, 3).trained_step == 3
    for name, where in (("default", run.path), ("step 3", run.checkpoint(3))):
        out = tmp_path / name
        merge.run(where, out=out, dtype=None, base="dequantized", observer=Silent())
        # The step that was merged is in merge.json.
        assert verify.run(out, against=run.path, observer=Silent()).passed, name
    other = verify.run(tmp_path / "step 3", against=run.checkpoint(2), observer=Silent())
    assert any("the run's adapter is not the one in merge.json" in fault for fault in other.faults)


def test_a_stopped_run_can_be_evaluated(stopped: tuple[Recipe, RunFolder], bases: Path) -> None:
    _, run = stopped
    rows = str(bases / "rows.jsonl")
    stored = {item.step: item.loss for item in read_evaluations(run.metrics)}
    result = evaluate.run(str(run.path), data=rows, observer=Silent())
    assert result.loss == pytest.approx(stored[2], rel=1e-4)
    other = evaluate.run(str(run.checkpoint(3)), data=rows, observer=Silent())
    assert other.loss != result.loss


def test_a_missing_checkpoint_is_named(stopped: tuple[Recipe, RunFolder]) -> None:
    _, run = stopped
    with pytest.raises(UsageError, match="no checkpoint of step 9; it has those of steps 1, 2, 3"):
        assert Run(run.checkpoint(9)).adapter_file


def test_a_checkpoint_of_an_older_version_is_explained(
    stopped: tuple[Recipe, RunFolder], tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(stopped[1].path, tmp_path / "run")))
    shutil.rmtree(run.checkpoint(1) / "adapter")
    with pytest.raises(UsageError, match="written by an older version"):
        assert Run(run.path, 1).adapter_file


def test_full_fine_tuning_can_be_used_from_a_checkpoint(bases: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"base": {"bits": 16}, "adapter": {"method": "full"}}
    recipe = recipe_of(bases, tmp_path / "run", **settings)
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    out = tmp_path / "merged"
    run = tmp_path / "run"
    merge.run(run, out=out, dtype="float32", base="original", observer=Silent())
    assert verify.run(out, against=run, observer=Silent()).passed


def test_the_interval_is_in_steps_or_a_share_of_an_epoch() -> None:
    assert steps_between(None, 40) is None
    assert steps_between(7, 40) == 7
    assert steps_between(0.25, 40) == 10
    assert steps_between(0.001, 40) == 1
    assert steps_between(1.0, 40) == 40


def test_the_best_evaluation_is_the_lowest_of_a_trained_step() -> None:
    assert best_evaluation([Evaluation(0, 0.1)]) is None
    found = best_evaluation(
        [Evaluation(0, 0.1), Evaluation(5, 2.0), Evaluation(9, 1.0), Evaluation(12, 1.0)]
    )
    assert found == Evaluation(9, 1.0)
    assert best_evaluation([Evaluation(1, float("nan")), Evaluation(2, 3.0)]) == Evaluation(2, 3.0)


def test_later_lines_are_removed_before_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 0, "eval_loss": 2.0}',
        '{"step": 1, "loss": 1.5}',
        '{"step": 1, "eval_loss": 1.0}',
        '{"step": 2, "loss": 1.4}',
        '{"step": 3, "lo',
    ]
    file.write_text("\n".join(lines))
    remove_lines_after(file, 1)
    assert file.read_text() == "\n".join(lines[:3]) + "\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_every": 2}, r"train.eval_every needs held-out rows; set data.eval"),
        ({"patience": 2}, r"train.patience needs"),
        ({"keep_best": True}, r"train.keep_best needs held-out rows"),
    ],
)
def test_settings_without_effect_are_refused(
    bases: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of(bases, bases / "run", data={"eval": None}, train=settings)
