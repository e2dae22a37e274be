"""Files and folders that appear complete or not at all, and the errors of writing them.

Content is written to a new name next to the target, synced to the disk and renamed. Each temporary
name is random, because a fixed one could be a file of the user's. A temporary folder contains a
marker file, by which a later process recognizes and removes what a killed process left.
"""

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

from pydantic import ValidationError

from qlora_cli.errors import InputError, QloraError, UsageError
from qlora_cli.units import format_bytes

_T = TypeVar("_T")
PARSE_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, RecursionError),
)
"""The exceptions that parsing raises on a file whose content was changed or cut short."""
_MAX_FAULT = 300
"""Characters of the description of a fault; it can repeat a part of the file."""
RETRY_HINT = "free disk space and try again"
RESUME_HINT = "earlier checkpoints are complete; free disk space and resume with --resume"
OTHER_DISK_HINT = "free disk space or name a folder on another disk with --out"
_MARKER = ".qlora-partial"
"""Name of the file that marks a folder as unfinished."""
_RESERVE_BYTES = 16 * 1024**2
"""Disk space that must stay free in addition, for headers, an index and other small files."""


@contextmanager
def report_write_errors(what: str, where: Path, hint: str = RETRY_HINT) -> Iterator[None]:
    """Convert an OSError inside the block into a QloraError. Use it around every write.

    what: name of the content for the message, "the adapter".
    where: path of the target.
    hint: what the user can do about it.
    """
    try:
        yield
    except OSError as fault:
        raise QloraError(
            f"{what} could not be written: {fault.strerror or fault}", where=str(where), hint=hint
        ) from fault


def require_free_space(what: str, folder: Path, num_bytes: int) -> None:
    """Raise QloraError if the disk of `folder` has less than `num_bytes` and a reserve free.

    what: name of the content for the message, "the merged model".
    folder: an existing folder on that disk.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _RESERVE_BYTES:
        raise QloraError(
            f"{what} needs {format_bytes(num_bytes)} on disk, and {format_bytes(free)} are free",
            where=str(folder),
            hint=OTHER_DISK_HINT,
        )


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a new file to write to. At the end of the block it replaces `file`.

    If the block raises, the new file is removed and `file` is unchanged.
    """
    partial = _partial_name(file)
    partial.touch(exist_ok=False)
    try:
        yield partial
        _sync_file(partial)
        partial.replace(file)
    except BaseException:  # Ctrl-C must not leave a partial file either.
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write to. At the end of the block it replaces `folder`.

    Unfinished folders of killed processes are removed first. If the block raises, the new folder is
    removed and `folder` is unchanged.
    """
    for left_over in partial_folders(folder):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = make_partial_folder(folder)
    try:
        yield partial
        _replace_folder(partial, folder)
    except BaseException:  # Ctrl-C must not leave a partial folder either.
        shutil.rmtree(partial, ignore_errors=True)
        raise


def make_partial_folder(folder: Path) -> Path:
    """Create a marked, unfinished folder next to `folder` and return its path.

    Use it with `publish_folder` if the unfinished folder must survive an error, so that a later
    process can complete it; otherwise use `atomic_folder`.
    """
    partial = _partial_name(folder)
    partial.mkdir(parents=True)
    try:
        (partial / _MARKER).write_text("qlora writes this folder and may remove it\n")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def publish_folder(partial: Path, folder: Path) -> None:
    """Sync the finished folder `partial` to the disk and rename it to `folder`.

    Raises UsageError if `folder` contains files; both folders are then unchanged.
    """
    _sync_folder(partial)
    with suppress(OSError):  # Removes an empty folder only.
        folder.rmdir()
    try:
        partial.rename(folder)
    except OSError as fault:
        if not folder.exists():
            raise
        raise UsageError(
            f"{folder} is in use by now; its files are not changed",
            where=str(folder),
            hint=f"the complete output is in {partial}; move the files in {folder} elsewhere and "
            "run the same command again",
        ) from fault
    (folder / _MARKER).unlink(missing_ok=True)


def partial_folders(folder: Path) -> list[Path]:
    """Return the unfinished folders that killed processes left next to `folder`."""
    return [path for path in _partial_paths(folder) if (path / _MARKER).is_file()]


def partial_files(file: Path) -> list[Path]:
    """Return the unfinished files that killed processes left of `atomic_file(file)`."""
    return [path for path in _partial_paths(file) if path.is_file()]


def remove_partial_files(file: Path) -> None:
    """Remove the unfinished files that killed processes left of `atomic_file(file)`."""
    for path in partial_files(file):
        path.unlink()


def read_json(file: Path, parse: Callable[[Any], _T], error: type[InputError] = UsageError) -> _T:
    """Return `parse(content)` of a JSON file.

    parse: converts the parsed JSON; may raise any of `PARSE_ERRORS`.
    error: the class to raise if the file is damaged or cannot be read.
    """
    try:
        return parse(json.loads(file.read_text()))
    except PARSE_ERRORS as fault:
        raise error(f"{file.name} is damaged: {_describe(fault)}", where=str(file)) from fault
    except OSError as fault:
        what = f"{file.name} cannot be read: {fault.strerror or fault}"
        raise error(what, where=str(file)) from fault


def _describe(fault: Exception) -> str:
    """Return what is wrong with a file, of the first fault if there are several."""
    if isinstance(fault, ValidationError):
        first = fault.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:_MAX_FAULT]
    return f"{type(fault).__name__}: {fault}"[:_MAX_FAULT]


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace `file` by a JSON file, atomically. Raises OSError if the disk is full."""
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _partial_paths(path: Path) -> list[Path]:
    """Return the existing files and folders with a name that `_partial_name(path)` can return."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    return sorted(entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))


def _replace_folder(partial: Path, folder: Path) -> None:
    """Rename the finished folder `partial` to `folder` and remove the older `folder`."""
    _sync_folder(partial)
    old = _partial_name(folder)
    if folder.exists():
        (folder / _MARKER).touch()  # If this process is killed now, the next one removes `old`.
        folder.replace(old)
    partial.replace(folder)
    (folder / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)


def _sync_file(file: Path) -> None:
    """Write a file's content to the disk, so that a power cut cannot leave an empty file."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
