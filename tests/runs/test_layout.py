"""The folder of a run: creating it, discarding it, and reading and writing run.json."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.runs.layout import RunFolder


def test_a_full_disk_keeps_run_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.write({"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QloraError, match=r"run\.json could not be written"):
        run.write({"a": 2})
    assert run.read() == {"a": 1}


def test_a_folder_in_use_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.create()
    run.write({"status": "running"})
    with pytest.raises(UsageError, match="is in use"):
        run.create()
    with pytest.raises(UsageError, match="is in use"):
        RunFolder(run.run_json).create()


@pytest.mark.parametrize("new", [True, False])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path, new: bool) -> None:
    run = RunFolder(tmp_path / ("x" * 300))
    with pytest.raises(UsageError, match="is not a path"), run.locked(new=new):
        pass


def test_a_run_without_a_step_can_be_discarded(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.write({})
    run.metrics.write_text("")
    run.discard()
    assert not run.path.exists()
    run.create()
    (run.path / "notes.txt").write_text("the user's own")
    run.discard()
    assert (run.path / "notes.txt").exists()


def test_a_missing_and_a_damaged_run_json_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run's folder"):
        RunFolder(tmp_path).read()
    (tmp_path / "run.json").write_text('{"status": ')
    with pytest.raises(UsageError, match=r"run\.json is damaged: JSON"):
        RunFolder(tmp_path).read()


def test_steps_are_those_with_a_complete_checkpoint_in_order(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.steps() == []
    for name in ("step-000200", "step-1000000", "step-000040", ".step-000300.partial", "notes"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.steps() == [40, 200, 1_000_000]
    assert run.checkpoint(40).name == "step-000040"
