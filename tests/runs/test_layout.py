"""A run's folder: whole or absent, never half; nothing of an older run is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.files.atomic import (
    atomic_file,
    atomic_folder,
    make_partial_folder,
    partial_folders,
    publish_folder,
    remove_partial_files,
    write_json,
)
from qlora_cli.runs.layout import RunFolder


def fill(folder: Path, text: str) -> Path:
    with atomic_folder(folder) as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "a").write_text(text)
    return folder


def fail(folder: Path, fault: BaseException) -> None:
    with atomic_folder(folder) as beside:
        (beside / "half").write_text("")
        raise fault


def write_half(file: Path) -> None:
    with atomic_file(file) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt


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
    for _ in range(2):
        (make_partial_folder(tmp_path / "x") / "rest").write_text("")
    other = make_partial_folder(tmp_path / "x.y")
    fill(tmp_path / "x", "first")
    fill(tmp_path / "x", "second")
    assert {path.name for path in tmp_path.iterdir()} == {"x", other.name}


def test_folders_and_files_of_the_user_with_similar_names_stay(tmp_path: Path) -> None:
    for name in (".x.partial", ".x.old", ".x.0123456789abcdef.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for name in (".x.json.partial", "x.json.partial", "x.tmp"):
        (tmp_path / name).write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    fill(tmp_path / "x", "first")
    fill(tmp_path / "x", "second")
    write_json(tmp_path / "x.json", {})
    remove_partial_files(tmp_path / "x.json")
    assert {path.name for path in tmp_path.iterdir()} == before | {"x", "x.json"}
    files = [path for path in tmp_path.rglob("*") if path.name == "mine"]
    assert [path.read_text() for path in files] == ["mine"] * 3


def test_a_name_is_taken_only_where_nothing_lies(tmp_path: Path) -> None:
    beside, folder = make_partial_folder(tmp_path / "x"), tmp_path / "x"
    (beside / "a").write_text("new")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is in use by now"):
        publish_folder(beside, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert partial_folders(folder) == [beside]
    (folder / "notes.txt").unlink()
    publish_folder(beside, folder)
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for text in ("first", "second"):
        with atomic_file(file) as beside:
            beside.write_text(text)
        assert file.read_text() == text
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode, "other users may read it as any file"
    with pytest.raises(KeyboardInterrupt):
        write_half(file)
    assert file.read_text() == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "plain"}


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    left, other = (f".{name}.0123456789abcdef.partial" for name in ("x", "x.y"))
    for name in (left, other, ".x.partial"):
        (tmp_path / name).write_text("")
    remove_partial_files(tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {other, ".x.partial"}


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
    publish_folder(tmp_path / "beside", tmp_path / "x")
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
    with pytest.raises(UsageError, match="is not a run's folder"):
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
