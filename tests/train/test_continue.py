"""Continuing: a finished run with more steps, a new run from an existing adapter, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Interrupted, UsageError
from qlora_cli.jobs import train
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_evaluations
from qlora_cli.train import loop
from tests.helpers.interrupted import Stopper, train_run
from tests.helpers.observers import NoteRecorder
from tests.helpers.resumed_runs import losses, make_bases, recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama")


def changed(recipe: Recipe, section: str = "train", **settings: object) -> Recipe:
    """Return the recipe with other settings in a section."""
    update = getattr(recipe, section).model_copy(update=settings)
    return recipe.model_copy(update={section: update})


def test_a_finished_run_is_extended(bases: Path, tmp_path: Path) -> None:
    recipe = recipe_of(bases, tmp_path / "run", train={"steps": 2, "schedule": "linear"})
    run = train_run(recipe)
    before = losses(run)
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()
    observer = NoteRecorder()
    longer = changed(recipe, steps=4)
    result = train.run(longer, recipe_path=None, resume=True, observer=observer)
    assert result.steps == 4
    assert losses(run)[:2] == before
    assert [line[0] for line in losses(run)] == [1, 2, 3, 4]
    assert [item.step for item in read_evaluations(run.metrics)] == [0, 2, 4]
    (note,) = [note for note in observer.notes if note.startswith("extended from 2 to 4 steps")]
    assert f"{losses(run)[2][2]:.2e}" in note
    assert run.read()["recipe"]["train"]["steps"] == 4
    assert (run.adapter / "adapter_model.safetensors").read_bytes() != adapter


def test_an_extension_begins_after_the_last_good_checkpoint(bases: Path, tmp_path: Path) -> None:
    settings = {"steps": 2, "checkpoint_every": 1, "schedule": "linear"}
    recipe = recipe_of(bases, tmp_path / "run", train=settings)
    run = train_run(recipe)
    (run.checkpoint(2) / "state.pt").write_bytes(b"damaged")
    observer = NoteRecorder()
    train.run(changed(recipe, steps=4), recipe_path=None, resume=True, observer=observer)
    (note,) = [note for note in observer.notes if note.startswith("extended from 2 to 4 steps")]
    assert "From step 2 " in note
    assert f"it continues with {losses(run)[1][2]:.2e}" in note


def test_a_run_is_not_shortened(bases: Path, tmp_path: Path) -> None:
    recipe = recipe_of(bases, tmp_path / "run", train={"steps": 3})
    train_run(recipe)
    with pytest.raises(UsageError, match=r"train\.steps was 3, is 2"):
        train_run(changed(recipe, steps=2), resume=True)
    with pytest.raises(UsageError, match=r"train\.lr was"):
        train_run(changed(recipe, steps=9, lr=1e-5), resume=True)


def test_a_run_starts_from_an_adapter(bases: Path, tmp_path: Path) -> None:
    first = train_run(recipe_of(bases, tmp_path / "first", train={"steps": 2}))
    again = recipe_of(bases, tmp_path / "second", train={"steps": 2})
    stored = json.loads(json.dumps(again.model_dump(mode="json")))
    assert stored["adapter"]["from"] is None
    for where in (first.path, first.adapter, first.checkpoint(2)):
        recipe = changed(again, "adapter", from_=str(where))
        recipe = recipe.model_copy(update={"output": str(tmp_path / f"from {where.name}")})
        second = train_run(recipe)
        assert read_evaluations(second.metrics)[0].loss == pytest.approx(
            read_evaluations(first.metrics)[-1].loss
        )


def test_another_adapter_is_refused(bases: Path, tmp_path: Path) -> None:
    first = train_run(recipe_of(bases, tmp_path / "first", train={"steps": 1}))
    other = recipe_of(bases, tmp_path / "second", train={"steps": 1})
    recipe = changed(other, "adapter", from_=str(first.path), rank=4)
    with pytest.raises(UsageError, match="rank is 3 in the adapter and 4 in the recipe"):
        train_run(recipe)
    recipe = changed(other, "adapter", from_=str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="there is no folder"):
        train_run(recipe)
    assert not (tmp_path / "second").exists()


def test_ctrl_c_is_reported_at_once(bases: Path, tmp_path: Path) -> None:
    class Watcher(Stopper, NoteRecorder):
        def __init__(self) -> None:
            NoteRecorder.__init__(self)
            self.after = 2

    observer = Watcher()
    recipe = recipe_of(bases, tmp_path / "run")
    with pytest.raises(Interrupted):
        train.run(recipe, recipe_path=None, resume=False, observer=observer)
    assert "saving step 2; press Ctrl-C again to stop at once" in observer.notes
    assert RunFolder(tmp_path / "run").steps() == [2]


def test_ctrl_c_within_a_step_names_the_step(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, observer = loop.train_step, NoteRecorder()
    notes_in_step: list[str] = []

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            notes_in_step.extend(observer.notes)
        return real(state, *rest)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 3"):
        train.run(
            recipe_of(bases, tmp_path / "run"), recipe_path=None, resume=False, observer=observer
        )
    assert notes_in_step[-1] == "finishing step 3, then saving; press Ctrl-C again to stop at once"
