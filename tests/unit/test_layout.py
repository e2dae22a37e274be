"""A run's folder: whole or absent, never half; nothing of an older run is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora_cli.checkpoint.layout import RunFolder, appear_whole, settle, write_json
from qlora_cli.errors import QloraError, UsageError


def fill(folder: Path, text: str) -> Path:
    with appear_whole(folder) as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "a").write_text(text)
    return folder


def fail(folder: Path, fault: BaseException) -> None:
    with appear_whole(folder) as beside:
        (beside / "half").write_text("")
        raise fault


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    folder = fill(tmp_path / "deep" / "x", "first")
    assert (folder / "inner" / "a").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


def test_an_older_folder_is_replaced_whole(tmp_path: Path) -> None:
    fill(tmp_path / "x", "first")
    (tmp_path / "x" / "stale").write_text("gone afterwards")
    fill(tmp_path / "x", "second")
    assert (tmp_path / "x" / "inner" / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert not (tmp_path / "x" / "stale").exists()


@pytest.mark.parametrize("fault", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_the_older_folder(fault: BaseException, tmp_path: Path) -> None:
    fill(tmp_path / "x", "first")
    with pytest.raises(type(fault)):
        fail(tmp_path / "x", fault)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "inner" / "a").read_text() == "first"


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    for left in (".x.partial", ".x.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rest").write_text("")
    fill(tmp_path / "x", "first")
    fill(tmp_path / "x", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_content_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((tmp_path / "x").exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "a").write_text("content")
    settle(tmp_path / "beside", tmp_path / "x")
    assert synced == [False]


def test_json_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(QloraError, match=r"run\.json could not be written"):
        RunFolder(tmp_path).write({"a": 2})


def test_a_folder_in_use_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.create()
    run.write({"status": "running"})
    with pytest.raises(UsageError, match="is in use"):
        run.create()
    with pytest.raises(UsageError, match="is in use"):
        RunFolder(run.run_json).create()


def test_a_run_that_did_nothing_can_be_discarded(tmp_path: Path) -> None:
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


def test_what_is_no_run_and_what_is_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run's folder"):
        RunFolder(tmp_path).read()
    (tmp_path / "run.json").write_text('{"status": ')
    with pytest.raises(UsageError, match=r"run\.json: damaged"):
        RunFolder(tmp_path).read()


def test_steps_are_those_with_a_whole_checkpoint_in_order(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.steps() == []
    for name in ("step-000200", "step-1000000", "step-000040", ".step-000300.partial", "notes"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.steps() == [40, 200, 1_000_000]
    assert run.checkpoint(40).name == "step-000040"
