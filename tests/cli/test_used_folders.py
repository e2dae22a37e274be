"""Folders in use, missing folders and damaged runs: exit code 2, and nothing is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.cli_checks import assert_refused, file_contents, truncate
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow


def test_a_folder_in_use_is_refused_and_not_changed(trained_recipe: Path) -> None:
    run = trained_recipe.parent / "run"
    before = file_contents(run)
    assert_refused(qlora("train", trained_recipe), 2, f"{run} is in use", "--resume", "output=...")
    # The folder is checked before the data is read.
    outcome = qlora("train", trained_recipe, "data.train=missing.jsonl")
    assert_refused(outcome, 2, f"{run} is in use")
    outcome = qlora("train", trained_recipe, "--resume", "train.lr=0.1")
    assert_refused(outcome, 2, run / "run.json", "train.lr was 0.0002, is 0.1")
    assert file_contents(run) == before


def test_a_folder_with_foreign_files_is_not_changed(job_recipe: Path) -> None:
    run = job_recipe.parent / "run"
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    assert_refused(qlora("train", job_recipe), 2, f"{run} is in use")
    assert file_contents(run) == {"mine.txt": b"mine"}
    assert_refused(qlora("train", job_recipe, "--resume"), 2, f"{run} is not a run's folder")


def test_an_output_that_cannot_be_a_folder_is_refused(job_recipe: Path) -> None:
    assert_refused(qlora("train", job_recipe, f"output={job_recipe}"), 2, f"{job_recipe} is in use")
    assert_refused(
        qlora("train", job_recipe, f"output={job_recipe}/below"),
        1,
        f"{job_recipe}/below",
        "Not a directory",
    )


def test_resuming_a_finished_run_changes_nothing(trained_recipe: Path) -> None:
    run = trained_recipe.parent / "run"
    result = json.loads((run / "run.json").read_text())["result"]
    memory = (run / "memory.json").read_bytes()
    outcome = qlora("train", trained_recipe, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["train_loss"] == result["train_loss"]
    assert (run / "memory.json").read_bytes() == memory


def test_commands_name_the_missing_folder_or_file(
    trained_recipe: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = trained_recipe.parent / "run"
    assert_refused(qlora("merge", run, "--out", tiny_base), 2, f"{tiny_base} is in use")
    assert_refused(
        qlora("merge", tmp_path, "--out", tmp_path / "m"), 2, f"{tmp_path} is not a run's folder"
    )
    assert_refused(qlora("verify", tmp_path / "no", "--against", run), 2, tmp_path / "no")
    assert_refused(
        qlora("verify", tiny_base, "--against", tmp_path), 2, f"{tmp_path} is not a run's folder"
    )
    assert_refused(qlora("report", tmp_path), 2, f"{tmp_path} is not a run's folder")
    assert_refused(qlora("eval", run, "--data", tmp_path / "no.jsonl"), 2, tmp_path / "no.jsonl")
    assert_refused(qlora("generate", tmp_path / "no", "--prompt", "x"), 2, tmp_path / "no")
    for arguments in (
        ("train",),
        ("eval", run),
        ("merge", run),
        ("train", trained_recipe, "--resum"),
    ):
        assert qlora(*arguments).code == 2


def test_a_run_with_damaged_files_is_refused(trained_recipe: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_recipe.parent / "run", tmp_path / "run")
    (run / "memory.json").write_text("{")
    assert_refused(qlora("report", run), 2, run / "memory.json", "damaged")
    truncate(run / "adapter" / "adapter_model.safetensors")
    for command in (("merge", run, "--out", tmp_path / "m"), ("generate", run, "--prompt", "x")):
        assert_refused(qlora(*command), 2, run / "adapter", "damaged")
    assert not (tmp_path / "m").exists()
    (run / "run.json").write_text("{")
    assert_refused(qlora("report", run), 2, run / "run.json", "damaged")


def test_a_damaged_merge_fails_verification(trained_recipe: Path, tmp_path: Path) -> None:
    run, out = trained_recipe.parent / "run", tmp_path / "merged"
    assert qlora("merge", run, "--out", out).code == 0
    truncate(next(out.glob("*.safetensors")))
    outcome = qlora("verify", out, "--against", run)
    assert outcome.code == 4, outcome.err
    assert "Traceback" not in outcome.err
