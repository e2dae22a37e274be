"""Examples: complete rows of encoded rows, or parts of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encode import Example
from qlora_cli.data.encoded import EncodedRows, Part


class Examples(Sequence[Example]):
    """Examples of encoded rows, created when they are needed.

    An example is a complete row or a part of it. encoded: the rows. rows: the row of each example.
    starts, lengths: its first token in the row, and its number of tokens. targets: its number of
    trained tokens. pieces: number of pieces that its row is split into, 0 if it is not split.
    piece: its number among them, from 1.
    """

    def __init__(
        self,
        encoded: EncodedRows,
        rows: NDArray[np.int64],
        starts: NDArray[np.int32],
        lengths: NDArray[np.int32],
        targets: NDArray[np.int32],
        piece: NDArray[np.int32],
        pieces: NDArray[np.int32],
    ) -> None:
        self.encoded = encoded
        self.rows, self.starts, self.lengths = rows, starts, lengths
        self.targets, self.piece, self.pieces = targets, piece, pieces

    @classmethod
    def whole(cls, encoded: EncodedRows) -> Examples:
        """Return all rows as they are."""
        zero = np.zeros(len(encoded), np.int32)
        rows = np.arange(len(encoded))
        return cls(encoded, rows, zero, encoded.lengths, encoded.targets, zero, zero)

    def take(self, places: Any) -> Examples:
        """Return some examples, given as a slice, indices or one boolean per example."""
        return Examples(self.encoded, *(column[places] for column in self._columns()))

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """Return all examples of the parts in order. They are of the same rows."""
        columns = zip(*(part._columns() for part in parts), strict=True)
        return cls(parts[0].encoded, *map(np.concatenate, columns))

    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.rows, *self.part_columns()

    def part_columns(self) -> tuple[NDArray[np.int32], ...]:
        """Return the arrays starts, lengths, targets, piece and pieces."""
        return self.starts, self.lengths, self.targets, self.piece, self.pieces

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        ids, labels = self.arrays(index)
        row = int(self.rows[index])
        value = float(self.encoded.values[row])
        return Example(
            ids.tolist(),
            labels.tolist(),
            self.origin(index),
            self.segments(index),
            value=None if np.isnan(value) else value,
            second=int(self.encoded.second[row]),
        )

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the token ids and the labels of an example."""
        row, start, length = (int(c[index]) for c in (self.rows, self.starts, self.lengths))
        return self.encoded.ids(row, start, length), self.encoded.labels(row, start, length)

    def digest(self) -> str:
        """Return a SHA-256 over token ids, labels and limits of all examples, in order."""
        digests = [hashlib.sha256() for _ in range(3)]
        for part in self.encoded.parts:
            used = slice(part.bounds[0], part.bounds[-1])
            labels = part.trained if part.labels is None else part.labels
            for digest, values in zip(digests, (part.ids, labels), strict=False):
                digest.update(np.ascontiguousarray(values[used]).data)
            digests[2].update(np.diff(part.bounds).data)
            if part.segments is not None:
                digests[2].update(np.ascontiguousarray(part.segments).data)
        columns = [self.rows, self.starts, self.lengths]
        if not np.isnan(self.encoded.values).all():
            columns += [self.encoded.values, self.encoded.second]
        for column in columns:
            digests[2].update(np.ascontiguousarray(column).data)
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()

    def segments(self, index: int) -> tuple[int, ...]:
        """Return the lengths of an example's segments; empty if it is one segment."""
        return self.encoded.segments(int(self.rows[index]))

    def segment_sizes(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the number of segments of each example and the length of its longest one.

        A piece of a split row is one segment: rows of several segments are never split.
        """
        longest = np.minimum(self.encoded.longest[self.rows], self.lengths)
        return self.encoded.num_segments[self.rows], longest

    def where(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the file and the line of each example."""
        return self.encoded.files[self.rows], self.encoded.lines[self.rows]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def origin(self, index: int) -> str:
        """Return file and line of an example, and the number of the piece if its row is split."""
        origin = self.encoded.origin(int(self.rows[index]))
        pieces = self.pieces[index]
        return f"{origin} [{self.piece[index]}/{pieces}]" if pieces else origin


def chosen_of_parts(examples: Examples) -> Iterator[tuple[Part, NDArray[np.int64]]]:
    """Yield each part of the table with the examples whose rows are in it."""
    parts = examples.encoded.parts
    firsts = np.array([part.first for part in parts])
    number = np.searchsorted(firsts, examples.rows, side="right") - 1
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(len(parts) + 1))
    for place, part in enumerate(parts):
        chosen = order[bounds[place] : bounds[place + 1]]
        if len(chosen):
            yield part, chosen
