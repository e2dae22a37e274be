"""Settings that a job chooses by plans: what run.json contains, and what a resumed run uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Interrupted, UsageError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps
from tests.helpers.interrupted import train_run
from tests.helpers.runs import make_base, make_recipe, make_rows

pytestmark = pytest.mark.slow

STEPS = 3
AUTO = {"micro_batch": "auto", "grad_accum": 4, "activation_checkpointing": "auto"}
CHOSEN = (
    "train.micro_batch",
    "train.grad_accum",
    "train.activation_checkpointing",
    "train.loss_chunk",
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = make_rows(tmp_path / "rows.jsonl", num=48, length=12)
    base = make_base(tmp_path / "base", "llama", spread=0.1)
    return make_recipe(base, rows, data={"seq_len": 32, "eval": None}, train={"steps": STEPS})


def variant(recipe: Recipe, output: Path, **train: Any) -> Recipe:
    changed = recipe.train.model_copy(update=train)
    return recipe.model_copy(update={"train": changed, "output": str(output)})


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in read_steps(run.metrics)]


def settings(run: RunFolder) -> dict[str, Any]:
    train = run.read()["recipe"]["train"]
    return {key: train[key.removeprefix("train.")] for key in CHOSEN}


def test_chosen_settings_are_in_the_run_and_give_the_same_loss(
    recipe: Recipe, tmp_path: Path
) -> None:
    run = train_run(variant(recipe, tmp_path / "auto", **AUTO))
    plain = train_run(variant(recipe, tmp_path / "plain", micro_batch=1, grad_accum=4))
    assert losses(run) == pytest.approx(losses(plain), rel=1e-6)
    found = settings(run)
    assert (found["train.micro_batch"], found["train.grad_accum"]) == (4, 1)
    assert found["train.activation_checkpointing"] == 0, "the model is tiny"
    choices = {choice["key"]: choice for choice in run.read()["choices"]}
    for key in CHOSEN:
        assert choices[key]["value"] == found[key]
        assert choices[key]["reason"]


def test_a_resumed_run_keeps_its_settings(recipe: Recipe, tmp_path: Path) -> None:
    whole = train_run(variant(recipe, tmp_path / "whole", **AUTO))
    job = variant(recipe, tmp_path / "run", **AUTO)
    with pytest.raises(Interrupted):
        train_run(job, stop_after=1)
    folder = RunFolder(tmp_path / "run")
    # As if less memory had been free when the run began.
    record = folder.read()
    record["recipe"]["train"] |= {"activation_checkpointing": 1, "loss_chunk": 20}
    folder.write(record)
    run = train_run(job, resume=True)
    assert settings(run)["train.activation_checkpointing"] == 1
    assert settings(run)["train.loss_chunk"] == 20
    assert {choice["key"] for choice in run.read()["choices"]} >= set(CHOSEN)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)


def test_another_policy_may_be_set_on_a_resume_and_another_chunk_may_not(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_run(variant(recipe, tmp_path / "run", **AUTO), stop_after=1)
    whole = train_run(variant(recipe, tmp_path / "whole", **AUTO))
    other = variant(recipe, tmp_path / "run", **AUTO, loss_chunk=7)
    with pytest.raises(UsageError, match=r"train\.loss_chunk"):
        train_run(other, resume=True)
    policy = AUTO | {"activation_checkpointing": True}
    run = train_run(variant(recipe, tmp_path / "run", **policy), resume=True)
    assert losses(run) == losses(whole), "equal bits"
