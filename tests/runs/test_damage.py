"""Damaged files of a run are found by their checksums, and the last good ones are used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.errors import Interrupted, ModelError
from qlora_cli.events import Silent
from qlora_cli.jobs import merge
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import assert_same_run, make_bases, recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama")


@pytest.fixture(scope="module")
def whole(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return an uninterrupted run, which no test may change."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return train_run(recipe_of(bases, output, train={"checkpoint_every": 1}))


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def flip_tensors(run: RunFolder) -> None:
    flip(run.checkpoint(2) / "trained.safetensors")


def flip_state(run: RunFolder) -> None:
    flip(run.checkpoint(2) / "state.pt")


def copy_older_state(run: RunFolder) -> None:
    shutil.copy(run.checkpoint(1) / "state.pt", run.checkpoint(2))


def remove_state(run: RunFolder) -> None:
    (run.checkpoint(2) / "state.pt").unlink()


def cut_checksums(run: RunFolder) -> None:
    (run.checkpoint(2) / "checksums.json").write_text('{"sha256": ')


FAULTS = [flip_tensors, flip_state, copy_older_state, remove_state, cut_checksums]


@pytest.fixture
def stopped(tmp_path: Path, bases: Path) -> tuple[Recipe, RunFolder]:
    """Return a run that was stopped after step 2 of 5, with checkpoints after steps 1 and 2."""
    recipe = recipe_of(bases, tmp_path / "run", train={"checkpoint_every": 1})
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    return recipe, RunFolder(tmp_path / "run")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checkpoint_before_a_damaged_one_is_used(
    stopped: tuple[Recipe, RunFolder], whole: RunFolder, fault: Callable[[RunFolder], None]
) -> None:
    recipe, run = stopped
    fault(run)
    train_run(recipe, resume=True)
    assert_same_run(whole, run)
    assert (run.checkpoints / "step-000002.damaged-1").is_dir(), "nothing that was written is lost"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_resumed(
    stopped: tuple[Recipe, RunFolder],
) -> None:
    recipe, run = stopped
    for step in (1, 2):
        flip(run.checkpoint(step) / "state.pt")
    with pytest.raises(ModelError, match=r"every checkpoint is damaged.*state\.pt"):
        train_run(recipe, resume=True)
    assert run.steps() == [1, 2]


def flip_adapter(run: RunFolder) -> None:
    flip(run.adapter / "adapter_model.safetensors")


def remove_adapter(run: RunFolder) -> None:
    shutil.rmtree(run.adapter)


@pytest.mark.parametrize("fault", [flip_adapter, remove_adapter])
def test_a_damaged_adapter_is_refused_and_written_again(
    tmp_path: Path, bases: Path, fault: Callable[[RunFolder], None]
) -> None:
    recipe = recipe_of(bases, tmp_path / "run")
    run = train_run(recipe)
    written = (run.adapter / "adapter_model.safetensors").read_bytes()
    fault(run)
    if fault is flip_adapter:
        with pytest.raises(ModelError, match=r"its SHA-256 differs"):
            merge.run(run.path, out=tmp_path / "out", dtype=None, base="auto", observer=Silent())
    train_run(recipe, resume=True)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == written
    merge.run(run.path, out=tmp_path / "out", dtype=None, base="auto", observer=Silent())


def test_a_damaged_adapter_of_a_checkpoint_is_refused(stopped: tuple[Recipe, RunFolder]) -> None:
    _, run = stopped
    flip(run.checkpoint(2) / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"SHA-256 differs[\s\S]*use another checkpoint"):
        _ = Run(run.path).adapter_file
    assert Run(run.path, 1).adapter_file
