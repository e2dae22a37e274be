"""Rows of data files, kept in one temporary file and not as Python objects.

Two million rows as dicts need several gigabytes. Here a row needs its pickled fields in a temporary
file, which is in memory while it is small, and 29 bytes in arrays.
"""

from __future__ import annotations

import pickle
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from qlora_cli.files.atomic import report_write_errors
from qlora_cli.recipe.schema import DataFormat

_IN_MEMORY = 32 * 1024**2
"""Bytes of rows that are kept in memory before they are written to a temporary file."""
_AT_ONCE = 1000
"""Rows that are read from the file in one go while all rows are visited."""
_DISK_HINT = "free disk space, or name a folder on another disk with QLORA_CACHE or TMPDIR"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is in the file.

    origin: file and line that the row begins on, for example `rows.jsonl:42`.
    fields: column or key -> value.
    """

    origin: str
    fields: dict[str, Any]

    @property
    def file(self) -> str:
        """Return the part of the origin that names the file or dataset."""
        return self.origin.rpartition(":")[0]


class RowStore:
    """All rows that were read, in order.

    names: short names of the files or datasets. folder: for the temporary file of many rows; None
    for the system's folder of temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._formats: list[DataFormat | None] = []
        self._file, self._line, self._format = array("i"), array("q"), array("b")
        self._ends = array("q", [0])
        self._folder = Path(gettempdir()) if folder is None else folder
        self._content = SpooledTemporaryFile(_IN_MEMORY, dir=str(self._folder))  # noqa: SIM115
        weakref.finalize(self, self._content.close)

    def __len__(self) -> int:
        return len(self._line)

    @property
    def num_bytes(self) -> int:
        """Return the size of all rows in the temporary file."""
        return self._ends[-1]

    @property
    def files(self) -> NDArray[np.int32]:
        """Return the index in `names` of each row's file."""
        return np.frombuffer(self._file, np.int32)

    @property
    def lines(self) -> NDArray[np.int64]:
        """Return the number in each row's origin."""
        return np.frombuffer(self._line, np.int64)

    def add(
        self, name: str, line: int, fields: dict[str, Any], row_format: DataFormat | None
    ) -> None:
        """Append a row.

        name, line: its origin. row_format: the format with these fields; None if there is none.
        Raises QloraError if the disk is full.
        """
        number = self._numbers.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        if row_format not in self._formats:
            self._formats.append(row_format)
        content = pickle.dumps(fields, pickle.HIGHEST_PROTOCOL)
        with report_write_errors("the rows", self._folder, _DISK_HINT):
            self._content.write(content)
        self._file.append(number)
        self._line.append(line)
        self._format.append(self._formats.index(row_format))
        self._ends.append(self._ends[-1] + len(content))

    def pickled(self, numbers: NDArray[np.int64]) -> list[bytes]:
        """Return the pickled fields of some rows. Consecutive rows are read in one go."""
        result: list[bytes] = []
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            if not len(run):
                continue
            ends = self._ends[int(run[0]) : int(run[-1]) + 2]
            self._content.seek(ends[0])
            content = self._content.read(ends[-1] - ends[0])
            bounds = [end - ends[0] for end in ends]
            result += [content[a:b] for a, b in pairwise(bounds)]
        return result

    def sizes(self, numbers: NDArray[np.int64]) -> Iterator[int]:
        """Yield the size of each of some rows in bytes."""
        return (self._ends[number + 1] - self._ends[number] for number in numbers)

    def origins(self, numbers: NDArray[np.int64]) -> list[str]:
        """Return file and line of some rows."""
        files, lines = self.files[numbers].tolist(), self.lines[numbers].tolist()
        return [f"{self.names[file]}:{line}" for file, line in zip(files, lines, strict=True)]

    def read(self, numbers: NDArray[np.int64]) -> list[Row]:
        """Return some rows."""
        return unpickled(self.origins(numbers), self.pickled(numbers))

    def votes(self, numbers: NDArray[np.int64]) -> Counter[DataFormat]:
        """Return how many of some rows have the fields of each format, the first row's first."""
        codes = np.frombuffer(self._format, np.int8)[numbers]
        found, first, counts = np.unique(codes, return_index=True, return_counts=True)
        votes: Counter[DataFormat] = Counter()
        for place in np.argsort(first):
            name = self._formats[found[place]]
            if name is not None:
                votes[name] = int(counts[place])
        return votes


def unpickled(origins: Sequence[str], pickled: Sequence[bytes]) -> list[Row]:
    """Return the rows with these origins and pickled fields."""
    pairs = zip(origins, pickled, strict=True)
    return [Row(origin, pickle.loads(content)) for origin, content in pairs]


class Rows(Sequence[Row]):
    """Chosen rows of a store, read when they are needed. A row may be chosen several times.

    store: all rows. numbers: of the chosen rows, in order.
    """

    def __init__(self, store: RowStore, numbers: NDArray[np.int64]) -> None:
        self.store = store
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self.store, self.numbers[index])
        return self.store.read(self.numbers[[index]])[0]

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts(_AT_ONCE, _IN_MEMORY):
            yield from self.store.read(part.numbers)

    def parts(self, max_rows: int, max_bytes: int) -> Iterator[Rows]:
        """Yield the rows in consecutive parts.

        A part has at most `max_rows` rows, and at most `max_bytes` without its last row.
        """
        first = num_bytes = 0
        for place, size in enumerate(self.store.sizes(self.numbers)):
            if place - first == max_rows or num_bytes > max_bytes:
                yield self[first:place]
                first, num_bytes = place, 0
            num_bytes += size
        if first < len(self):
            yield self[first:]

    @property
    def files(self) -> NDArray[np.int32]:
        """Return the index of each row's file in the names of the store."""
        return self.store.files[self.numbers]

    @property
    def votes(self) -> Counter[DataFormat]:
        """Return how many rows have the fields of each format."""
        return self.store.votes(self.numbers)

    def take(self, places: Any) -> Rows:
        """Return the rows at some places, given as indices or as one boolean per row."""
        return Rows(self.store, self.numbers[places])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, one after the other. All are of the same store."""
        return cls(parts[0].store, np.concatenate([part.numbers for part in parts]))
