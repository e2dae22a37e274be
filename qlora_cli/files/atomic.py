"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from qlora_cli.errors import InputError, QloraError, UsageError

_T = TypeVar("_T")
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, AssertionError)
"""What readers raise on a file that is no longer as it was written."""
TRY_AGAIN = "free disk space and try again"
RESUME = "the last checkpoint is whole; free disk space and resume with --resume"
OTHER_DISK = "free disk space or name a folder on another disk with --out"
"""What to do where the disk is full."""
_MARK = ".qlora-partial"
"""Lies in each folder that is being written."""


@contextmanager
def writing(what: str, where: Path, hint: str = TRY_AGAIN) -> Iterator[None]:
    """Turns a disk's refusal into a QloraError that says what could not be written."""
    try:
        yield
    except OSError as fault:
        raise QloraError(
            f"{what} could not be written: {fault.strerror or fault}", where=str(where), hint=hint
        ) from fault


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yields a new file beside `file` to write into; it replaces `file` when it is on the disk.

    On an error the new file is removed and `file` is as it was.
    """
    beside = _beside(file)
    beside.touch(exist_ok=False)
    try:
        yield beside
        _to_disk(beside)
        beside.replace(file)
    except BaseException:  # Ctrl-C too must leave nothing half written
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def appear_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name when all of it is on the disk.

    An older folder of the name is replaced at the end. On an error nothing is left of the new one.
    """
    for left in left_beside(folder):
        shutil.rmtree(left, ignore_errors=True)
    beside = make_beside(folder)
    try:
        yield beside
        _replace(beside, folder)
    except BaseException:  # Ctrl-C too must leave nothing half written
        shutil.rmtree(beside, ignore_errors=True)
        raise


def settle(beside: Path, folder: Path) -> None:
    """Gives the finished folder `beside` the name `folder`, once its files are on the disk.

    Raises UsageError where something lies in `folder`; both are left as they are.
    """
    _files_to_disk(beside)
    with suppress(OSError):  # Removes an empty folder and no other one.
        folder.rmdir()
    try:
        beside.rename(folder)
    except OSError as fault:
        if not folder.exists():
            raise
        raise UsageError(
            f"{folder} is in use by now; its files are left as they are",
            where=str(folder),
            hint=f"what was to be written there is whole in {beside}; move the files elsewhere and "
            "run the same command again",
        ) from fault
    (folder / _MARK).unlink(missing_ok=True)


def make_beside(folder: Path) -> Path:
    """Makes a new folder beside `folder`, with a mark in it by which `left_beside` finds it."""
    beside = _beside(folder)
    beside.mkdir(parents=True)
    try:
        (beside / _MARK).write_text("qlora writes this folder and may remove it\n")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return beside


def left_beside(folder: Path) -> list[Path]:
    """The marked folders beside `folder`: what killed processes did not finish."""
    return [path for path in _named_beside(folder) if (path / _MARK).is_file()]


def remove_left(file: Path) -> None:
    """Removes what killed processes left of `whole_file(file)`."""
    for path in _named_beside(file):
        if path.is_file():
            path.unlink()


def _beside(path: Path) -> Path:
    """A new name each time: a fixed one could be a file of the user's."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _named_beside(path: Path) -> list[Path]:
    """What has a name that `_beside(path)` makes."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    return sorted(entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))


def _replace(beside: Path, folder: Path) -> None:
    """Gives a finished folder its name, in place of an older one."""
    _files_to_disk(beside)
    old = _beside(folder)
    if folder.exists():
        (folder / _MARK).touch()  # A process killed between the renames leaves it for the next one.
        folder.replace(old)
    beside.replace(folder)
    (folder / _MARK).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def read_json(file: Path, make: Callable[[Any], _T], kind: type[InputError] = UsageError) -> _T:
    """What `make` makes of a file's content. Raises `kind` where it is no longer as written."""
    try:
        return make(json.loads(file.read_text()))
    except DAMAGE as fault:
        raise kind(f"{file.name} is damaged: {fault!r}", where=str(file)) from fault


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or as it was before."""
    with whole_file(file) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def _files_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _to_disk(path)


def _to_disk(file: Path) -> None:
    """A rename must never survive a power cut that the content did not."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
