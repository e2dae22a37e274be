"""A tensor that stays in a file and is read in parts, without mapping the file.

Mapping would count the whole file as address space of the process. The system keeps pages that were
read in its cache, which is not memory of the process, and drops them when memory is needed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.safetensors_io import TensorEntry, bytes_of


class OpenFile:
    """A file that is open for reading as long as this object exists. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True)
class DiskTensor:
    """A tensor (rows, ...) in a file."""

    entry: TensorEntry
    file: OpenFile

    def read(self) -> Tensor:
        """Return the tensor in memory of its own. Raises ModelError as `read_into` does."""
        tensor = torch.empty(self.entry.shape, dtype=self.entry.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, target: Tensor, start_row: int = 0) -> None:
        """Fill a contiguous tensor on the CPU with rows from `start_row` on.

        Raises ModelError if the file ends before.
        """
        if target.numel():
            self.read_bytes(bytes_of(target), start_row * self._row_bytes)

    def read_rows(self, ids: Tensor) -> Tensor:
        """Return rows (n, ...) of the tensor. ids: (n,) int64 on the CPU.

        Raises IndexError if there is no such row, ModelError as `read_into` does.
        """
        unique, places = ids.unique(return_inverse=True)
        rows = torch.empty((unique.numel(), *self.entry.shape[1:]), dtype=self.entry.dtype)
        if not ids.numel():
            return rows
        if int(unique[0]) < 0 or int(unique[-1]) >= self.entry.shape[0]:
            raise IndexError("a row of a table is out of range")
        buffer, size = bytes_of(rows), self._row_bytes
        for number, row in enumerate(unique.tolist()):
            self.read_bytes(buffer[number * size : (number + 1) * size], row * size)
        return rows.index_select(0, places)

    def will_need(self) -> None:
        """Let the system begin to read the tensor into its cache."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # Only advice; some file systems have none.
                where = (self.file.descriptor, self.entry.start, self.entry.num_bytes)
                os.posix_fadvise(*where, os.POSIX_FADV_WILLNEED)

    @property
    def _row_bytes(self) -> int:
        return self.entry.num_bytes // (self.entry.shape[0] if self.entry.shape else 1)

    def read_bytes(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with bytes from `offset` on. Raises ModelError as `read_into` does."""
        filled = 0
        while filled < len(buffer):
            at = self.entry.start + offset + filled
            count = os.preadv(self.file.descriptor, [buffer[filled:]], at)
            if not count:
                raise ModelError(
                    "the packed copy of the base is shorter than its header states",
                    where=str(self.entry.file),
                    hint="clear it (`qlora cache clear`); the base is packed again",
                )
            filled += count
