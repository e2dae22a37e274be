"""Packed bases in the cache: reading, writing, what to do with damage, and their largest size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from torch import Tensor

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.events import Observer
from qlora_cli.files import cache
from qlora_cli.files.atomic import atomic_folder, require_free_space, write_json
from qlora_cli.files.disk_tensor import DiskTensor
from qlora_cli.files.packed_files import (
    DamagedCopy,
    PackedFiles,
    files_bytes,
    open_packed,
    specs_of,
    write_packed,
)
from qlora_cli.files.safetensors_io import TensorSpec
from qlora_cli.units import GIB, format_bytes, format_count, parse_bytes

LIMIT = "QLORA_PACKED_LIMIT"
"""Environment variable with the largest size of all packed bases together."""
DEFAULT_LIMIT = 50 * GIB
_DAMAGED = "-damaged"
_LIMIT_LOCK = "limit"
"""Name of the lock that the process holds which adds a packed base."""


def size_limit() -> int:
    """Return the largest size in bytes of all packed bases together. Raises UsageError."""
    text = os.environ.get(LIMIT)
    try:
        return parse_bytes(text) if text else DEFAULT_LIMIT
    except ValueError as fault:
        raise UsageError(str(fault), where=f"the environment variable {LIMIT}") from fault


class PackedStore:
    """The packed copy of one base in one format.

    folder: of the entry in the cache. description: for the user. observer: receives a note if the
    copy is used, kept, damaged, or cannot be kept. Reading and writing it never raises an error.
    """

    def __init__(self, folder: Path, description: str, observer: Observer) -> None:
        self.folder = folder
        self._description = description
        self._observer = observer
        self._limit = size_limit()
        self._files: PackedFiles | None = None
        self._is_absent = self._is_damaged = False

    def exists(self) -> bool:
        """Return whether there is a copy that can be opened."""
        with suppress(DamagedCopy):
            return bool(open_packed(self.folder).entries)
        return False

    def read(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Tensor] | None:
        """Return the tensors of `specs`, mapped from the copy; None if they cannot be used.

        That is if there is no copy or one of them is damaged; then the copy is not used any more.
        """
        files = self._opened()
        if files is None:
            return None
        try:
            return {name: files.read(name, spec) for name, spec in specs.items()}
        except DamagedCopy as fault:
            self._set_aside(str(fault))
            return None

    def disk_tensors(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, DiskTensor] | None:
        """Return the tensors of `specs` in the copy's files; None as `read` does."""
        files = self._opened()
        if files is None:
            return None
        try:
            return {name: files.disk_tensor(name, spec) for name, spec in specs.items()}
        except DamagedCopy as fault:
            self._set_aside(str(fault))
            return None

    def write(self, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write the copy while `tensors` are computed, one after the other.

        specs: of the tensors, in their order. Raises QloraError if the copy cannot be kept.
        """
        try:
            self._write(specs, tensors)
        except (OSError, QloraError) as fault:
            what = "base.residency: disk reads the packed copy of the base, which cannot be kept: "
            reason = fault.what if isinstance(fault, QloraError) else fault.strerror or str(fault)
            room = f"make room for {format_bytes(files_bytes(specs))} in {self.folder.parent}"
            hint = f"{room}, raise {LIMIT}"
            raise QloraError(
                f"{what}{reason}", where="base.residency", hint=f"{hint} or use another residency"
            ) from fault
        self._is_absent = self._is_damaged = False

    def finish(self, tensors: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Write the copy if it is absent or was set aside.

        tensors: returns the names and the tensors of the base as the model holds them.
        """
        if self._files is not None:
            return
        specs = specs_of(tensors())
        try:
            self._write(specs, tensors())
        except (OSError, QloraError) as fault:
            reason = fault.what if isinstance(fault, QloraError) else fault.strerror or str(fault)
            self._observer.note(f"the packed base is not kept for later starts: {reason}")

    def _opened(self) -> PackedFiles | None:
        """Return the copy; None if it is absent or damaged, which is decided once."""
        if self._files is None and not (self._is_absent or self._is_damaged):
            self._is_absent = not self.folder.is_dir()
            if not self._is_absent:
                self._open()
        return self._files

    def _open(self) -> None:
        try:
            self._files = open_packed(self.folder)
        except DamagedCopy as fault:
            self._set_aside(str(fault))
            return
        with suppress(OSError):  # The time of the last use; the cache may be read-only.
            os.utime(self.folder / cache.ENTRY)
        size = format_bytes(self._files.num_bytes)
        self._observer.note(f"the packed base of an earlier start is used ({size})")

    def _set_aside(self, reason: str) -> None:
        """Rename a damaged copy, so that it is written again and can be examined."""
        self._files, self._is_damaged = None, True
        aside = self.folder.with_name(self.folder.name + _DAMAGED)
        where = f"it was renamed to {aside}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)
            with suppress(OSError):
                description = f"damaged ({reason}): {self._description}"
                write_json(aside / cache.ENTRY, {"description": description})
        except OSError as fault:
            where = f"it stays in {self.folder} ({fault.strerror or fault})"
        self._observer.note(
            f"warning: the packed copy of the base is damaged and is not used: {reason}; {where}; "
            "the base is packed again"
        )

    def _write(
        self, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Write the copy. Raises OSError, or QloraError if there is no room for it."""
        num_bytes = files_bytes(specs)
        with ExitStack() as stack:
            locks = (self.folder, self.folder.with_name(_LIMIT_LOCK))
            if not all(stack.enter_context(cache.locked(lock, wait=False)) for lock in locks):
                raise QloraError("another process writes one now")
            if self.folder.is_dir() and not self._is_damaged:
                return  # Another process has written it since this one began.
            self._make_room(num_bytes)
            require_free_space("it", self.folder.parent, num_bytes)
            with atomic_folder(self.folder) as partial:
                write_packed(partial, self._description, specs, tensors)
        self._observer.note(
            f"the packed base is kept for later starts ({format_bytes(num_bytes)} in "
            f"{self.folder}); base.cache=false keeps none"
        )

    def _make_room(self, num_bytes: int) -> None:
        """Remove the packed bases that were not used for longest, until this one fits.

        Raises QloraError if it is larger than the limit.
        """
        if num_bytes > self._limit:
            raise QloraError(
                f"it needs {format_bytes(num_bytes)}, and {LIMIT} is {format_bytes(self._limit)}"
            )
        others = [entry for entry in cache.entries() if entry.kind == cache.PACKED]
        others.sort(key=lambda entry: _last_use(cache.entry_folder(entry.kind, entry.key)))
        total, removed = sum(entry.bytes for entry in others), 0
        for entry in others:
            if total + num_bytes <= self._limit:
                break
            if cache.remove(entry):
                total, removed = total - entry.bytes, removed + 1
        if total + num_bytes > self._limit:
            raise QloraError("other processes use the packed bases that would have to be removed")
        if removed:
            what = "packed base" if removed == 1 else "packed bases"
            self._observer.note(
                f"removed the {format_count(removed)} least recently used {what}, to keep all "
                f"within {format_bytes(self._limit)} ({LIMIT})"
            )


def _last_use(folder: Path) -> float:
    with suppress(OSError):
        return (folder / cache.ENTRY).stat().st_mtime
    return 0.0
