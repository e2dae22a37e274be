"""Files and folders are replaced completely or not at all; files of the user are never touched."""

from __future__ import annotations

import json
import os
import shutil
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
    report_write_errors,
    require_free_space,
    write_json,
)


def write_folder(folder: Path, text: str) -> Path:
    with atomic_folder(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text(text)
    return folder


def fail_to_write(folder: Path, fault: BaseException) -> None:
    with atomic_folder(folder) as partial:
        (partial / "half").write_text("")
        raise fault


def write_half_a_file(file: Path) -> None:
    with atomic_file(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "deep" / "x", "first")
    assert (folder / "inner" / "a").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


def test_an_older_folder_is_replaced_completely(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", "first")
    (tmp_path / "x" / "stale").write_text("gone afterwards")
    write_folder(tmp_path / "x", "second")
    assert (tmp_path / "x" / "inner" / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert not (tmp_path / "x" / "stale").exists()


@pytest.mark.parametrize("fault", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
def test_an_error_keeps_the_older_folder(fault: BaseException, tmp_path: Path) -> None:
    write_folder(tmp_path / "x", "first")
    with pytest.raises(type(fault)):
        fail_to_write(tmp_path / "x", fault)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "inner" / "a").read_text() == "first"


def test_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for _ in range(2):
        (make_partial_folder(tmp_path / "x") / "rest").write_text("")
    other = make_partial_folder(tmp_path / "x.y")
    write_folder(tmp_path / "x", "first")
    write_folder(tmp_path / "x", "second")
    assert {path.name for path in tmp_path.iterdir()} == {"x", other.name}


def test_files_of_the_user_with_similar_names_are_kept(tmp_path: Path) -> None:
    for name in (".x.partial", ".x.old", ".x.0123456789abcdef.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for name in (".x.json.partial", "x.json.partial", "x.tmp"):
        (tmp_path / name).write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    write_folder(tmp_path / "x", "first")
    write_folder(tmp_path / "x", "second")
    write_json(tmp_path / "x.json", {})
    remove_partial_files(tmp_path / "x.json")
    assert {path.name for path in tmp_path.iterdir()} == before | {"x", "x.json"}
    files = [path for path in tmp_path.rglob("*") if path.name == "mine"]
    assert [path.read_text() for path in files] == ["mine"] * 3


def test_a_folder_is_not_published_over_other_files(tmp_path: Path) -> None:
    partial, folder = make_partial_folder(tmp_path / "x"), tmp_path / "x"
    (partial / "a").write_text("new")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is in use by now"):
        publish_folder(partial, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert partial_folders(folder) == [partial]
    (folder / "notes.txt").unlink()
    publish_folder(partial, folder)
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for text in ("first", "second"):
        with atomic_file(file) as partial:
            partial.write_text(text)
        assert file.read_text() == text
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode, "other users can read it like any file"
    with pytest.raises(KeyboardInterrupt):
        write_half_a_file(file)
    assert file.read_text() == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "plain"}


def test_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    left, other = (f".{name}.0123456789abcdef.partial" for name in ("x", "x.y"))
    for name in (left, other, ".x.partial"):
        (tmp_path / name).write_text("")
    remove_partial_files(tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {other, ".x.partial"}


def test_content_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((tmp_path / "x").exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "a").write_text("content")
    publish_folder(tmp_path / "partial", tmp_path / "x")
    assert synced == [False]


def test_a_json_file_is_replaced_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_error_of_the_disk_names_the_content_and_the_target(tmp_path: Path) -> None:
    with (
        pytest.raises(QloraError, match="the thing could not be written: No space left") as caught,
        report_write_errors("the thing", tmp_path, "try another disk"),
    ):
        raise OSError(28, "No space left on device")
    assert (caught.value.where, caught.value.hint) == (str(tmp_path), "try another disk")


def test_too_little_free_space_is_reported(tmp_path: Path) -> None:
    require_free_space("the thing", tmp_path, 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(QloraError, match=r"the thing needs .* on disk, and .* are free"):
        require_free_space("the thing", tmp_path, 2 * free)
