"""Runs of `task: preference`: reference values are stored, resume is exact, eval, merge, verify."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import InputError, Interrupted, ModelError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.compare.eval_rows import eval_rows
from qlora_cli.files.locate import read_config
from qlora_cli.jobs import evaluate, full_finetune_baseline, merge, plan, verify
from qlora_cli.jobs.eval_answers import AnswersFile
from qlora_cli.jobs.pair_results import PairEvalResult
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps
from qlora_cli.runs.run import Run
from qlora_cli.tasks.preference import PreferenceTask
from tests.helpers.interrupted import train_run
from tests.helpers.pairs import make_pair_rows
from tests.helpers.resumed_runs import assert_same_run, recipe_of
from tests.helpers.runs import make_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_pair_rows(folder / "rows.jsonl", num=9, length=10)
    make_base(folder / "llama", "llama", spread=0.1)
    return folder


def recipe(bases: Path, output: Path, **sections: Any) -> Recipe:
    """A run of five steps on nine pairs, of which two share a sequence."""
    preference = {"beta": 0.5, **sections.pop("preference", {})}
    data = {"seq_len": 64, **sections.pop("data", {})}
    return recipe_of(bases, output, task="preference", preference=preference, data=data, **sections)


@pytest.fixture(scope="module")
def finished(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_run(recipe(bases, tmp_path_factory.mktemp("runs") / "finished"))


def evaluations(run: RunFolder) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def test_a_run_reports_metrics_of_pairs(finished: RunFolder) -> None:
    """With B = 0 the loss is log 2 and rewards are 0; training raises the margin."""
    steps = read_steps(finished.metrics)
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
        assert all(math.isfinite(line[f"train_{name}"]) for line in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["train_margin"] == pytest.approx(0.0, abs=1e-4)
    before, after = evaluations(finished)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (before["eval_pairs"], before["margin"]) == (9, pytest.approx(0.0, abs=1e-4))
    assert after["margin"] > 0.1
    assert after["eval_loss"] < before["eval_loss"]


def test_reference_values_are_those_of_the_base(finished: RunFolder, bases: Path) -> None:
    """Every row has both values, and held-out rows, which are the same here, have equal ones."""
    stored = load_file(finished.constants)
    assert stored["train"].shape == stored["held_out"].shape == (9, 2)
    assert bool((stored["train"] < 0).all())
    torch.testing.assert_close(stored["train"], stored["held_out"], rtol=1e-5, atol=1e-4)


CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "without packing": {"data": {"packing": False}},
    "full": {"base": {"bits": 16}, "adapter": {"method": "full"}},
    "orpo": {"preference": {"loss": "orpo"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, bases: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed process reads the reference values; it does not compute them again."""
    uninterrupted = train_run(recipe(bases, tmp_path / "uninterrupted", **CASES[case]))
    settings = recipe(bases, tmp_path / "stopped", **CASES[case])
    with pytest.raises(Interrupted):
        train_run(settings, stop_after=2)
    stopped = RunFolder(Path(settings.output))
    stored = stopped.constants.read_bytes() if case != "orpo" else None
    compute = PreferenceTask.constants

    def only_planned(*arguments: Any) -> Tensor:
        assert arguments[-1].type == "meta", "computed again"
        return compute(*arguments)

    monkeypatch.setattr(PreferenceTask, "constants", only_planned)
    torch.manual_seed(999)
    resumed = train_run(settings, resume=True)
    if case == "full":
        name = "model.safetensors"
        assert (resumed.weights / name).read_bytes() == (uninterrupted.weights / name).read_bytes()
    else:
        assert_same_run(resumed, uninterrupted)
    assert resumed.constants.is_file() == (case != "orpo")
    if stored is not None:
        assert resumed.constants.read_bytes() == stored == uninterrupted.constants.read_bytes()


@pytest.fixture
def stopped(bases: Path, tmp_path: Path) -> Recipe:
    """The recipe of a run that was stopped after two steps, with rows of its own."""
    rows = make_pair_rows(tmp_path / "pairs.jsonl", num=9, length=10)
    data = {"train": str(rows), "eval": str(rows)}
    settings = recipe(bases, tmp_path / "stopped", data=data)
    with pytest.raises(Interrupted):
        train_run(settings, stop_after=2)
    return settings


@pytest.mark.parametrize("fault", ["missing", "damaged", "other rows"])
def test_a_resume_without_its_reference_values_is_refused(stopped: Recipe, fault: str) -> None:
    """Other values would silently change the loss."""
    constants = RunFolder(Path(stopped.output)).constants
    if fault == "missing":
        constants.unlink()
    elif fault == "damaged":
        constants.write_bytes(constants.read_bytes()[:40])
    else:
        save_file(load_file(constants), constants, {"key": "of other rows"})
    with pytest.raises(ModelError, match="reference log-probabilities cannot be used"):
        train_run(stopped, resume=True)


def test_a_longer_run_computes_the_rows_that_it_adds(bases: Path, tmp_path: Path) -> None:
    """A run of one step needs the reference values of that step's rows only."""
    train = {"steps": 1, "grad_accum": 1, "micro_batch": 1}
    short = recipe(bases, tmp_path / "run", train=train)
    run = train_run(short)
    known = ~load_file(run.constants)["train"].isnan().any(dim=1)
    assert 0 < int(known.sum()) < 9
    before = load_file(run.constants)["train"][known]
    train_run(recipe(bases, tmp_path / "run", train=train | {"steps": 9}), resume=True)
    after = load_file(run.constants)["train"]
    assert torch.equal(after[known], before)
    assert not after.isnan().any()
    full = {"base": {"bits": 16}, "adapter": {"method": "full"}}
    train_run(recipe(bases, tmp_path / "full", train=train, **full))
    longer = recipe(bases, tmp_path / "full", train=train | {"steps": 9}, **full)
    with pytest.raises(UsageError, match="need the weights before the first step"):
        train_run(longer, resume=True)


def test_the_start_can_be_the_reference(finished: RunFolder, bases: Path, tmp_path: Path) -> None:
    """Training starts with another adapter, which is then the reference: rewards begin at 0."""
    settings = {
        "adapter": {"dropout": 0.0, "from": str(finished.path)},
        "preference": {"reference": "start"},
    }
    run = train_run(recipe(bases, tmp_path / "run", **settings))
    assert read_steps(run.metrics)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    base = load_file(finished.constants)["train"]
    assert not torch.allclose(load_file(run.constants)["train"], base, atol=1e-2)
    rows = str(bases / "rows.jsonl")
    result = evaluate.run(str(run.path), data=rows, observer=Silent())
    assert isinstance(result, PairEvalResult)
    assert result.loss == pytest.approx(evaluations(run)[-1]["eval_loss"], rel=1e-4)


def test_eval_gives_what_the_run_measured(finished: RunFolder, bases: Path, tmp_path: Path) -> None:
    answers = AnswersFile(tmp_path / "answers.jsonl", 3)
    rows = str(bases / "rows.jsonl")
    result = evaluate.run(str(finished.path), data=rows, observer=Silent(), answers=answers)
    assert isinstance(result, PairEvalResult)
    last = evaluations(finished)[-1]
    assert result.pairs == 9
    assert result.loss == pytest.approx(last["eval_loss"], rel=1e-4)
    assert result.margin == pytest.approx(last["margin"], rel=1e-3)
    assert result.accuracy == last["accuracy"]
    first = json.loads(Path(rows).read_text().splitlines()[0])
    line = json.loads(answers.path.read_text().splitlines()[0])
    assert (line["prompt"], line["reference"]) == (first["prompt"], first["chosen"])


def test_eval_of_a_plain_model_refuses_pairs(bases: Path) -> None:
    with pytest.raises(InputError, match="pairs of a chosen and a rejected answer"):
        evaluate.run(str(bases / "llama"), data=str(bases / "rows.jsonl"), observer=Silent())


def test_eval_of_full_fine_tuning_refuses_a_loss_with_a_reference(
    bases: Path, tmp_path: Path
) -> None:
    full = {"base": {"bits": 16}, "adapter": {"method": "full"}}
    run = train_run(recipe(bases, tmp_path / "run", **full))
    with pytest.raises(UsageError, match="the reference model of its loss is not loaded"):
        evaluate.run(str(run.path), data=str(bases / "rows.jsonl"), observer=Silent())


@pytest.mark.parametrize("base", ["dequantized", "auto"])
def test_a_run_is_merged_and_verified(finished: RunFolder, tmp_path: Path, base: Any) -> None:
    """Both answers of each pair are compared, each as a row of its own.

    The base of random weights is changed more by quantization than by five steps of training, so
    the merge into the original base would lose them.
    """
    merge.run(finished.path, out=tmp_path / "merged", dtype=None, base=base, observer=Silent())
    result = verify.run(tmp_path / "merged", against=finished.path, observer=Silent())
    assert result.passed, result.faults


def test_compared_rows_are_the_answers_in_turn(finished: RunFolder) -> None:
    """The loss that decides about the base of a merge falls if the chosen answers gain."""
    run = Run(finished.path)
    rows = eval_rows(run.recipe, run.base_folder, read_config(run.base_folder / "config.json"))
    assert len(rows.rows) == 18
    assert rows.rows[0].ids[:4] == rows.rows[1].ids[:4] != rows.rows[2].ids[:4]
    assert rows.signs is not None
    counts = [row.num_targets for row in rows.rows]
    parts = rows.signs.split(counts)
    assert [set(part.tolist()) for part in parts] == [{1}, {-1}] * 9


def test_full_fine_tuning_is_measured_on_the_same_pairs(bases: Path, tmp_path: Path) -> None:
    run = train_run(recipe(bases, tmp_path / "run"))
    full_finetune_baseline.measure(run.path, observer=Silent())
    before = json.loads(run.memory_json.read_text())["before"]
    assert before["source"] == "measured"
    assert before["peak_bytes"] > 0


def test_a_recipe_is_planned_without_its_rows(bases: Path, tmp_path: Path) -> None:
    settings = recipe(bases, tmp_path / "run")
    result = plan.run(settings, device_profile=None, fit=True, compare=True)
    assert {phase.name for phase in result.ledger.phases} >= {"load", "first_step", "step", "eval"}
    assert result.length is not None
    assert result.length.rows == 9
