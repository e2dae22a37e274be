"""Encoded rows as Arrow tables, in memory or mapped from a file.

A table has one record batch per part of the rows that was encoded in one go. Columns:

- `input_ids`: token ids, list of int32
- `trained`: for each token whether its label is the token itself, list of uint8
- `labels`: labels, list of int32; null if `trained` determines them
- `segments`: lengths of the parts that do not attend to each other, list of int32; null if every
  row of the batch is one part
- `targets`: number of trained tokens, int32
- `value`: what the row is labelled with, float32; NaN if it has no value
- `second`: first token of the second text of a pair, int32; 0 if there is none
- `file`, `line`: index of the file's name, int32, and the line of the row, int64
- `words`: digest of the row's words, uint64; 0 if it has no text
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qlora_cli.nn.labels import IGNORE_INDEX

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.uint8()),
        "labels": pa.list_(pa.int32()),
        "segments": pa.list_(pa.int32()),
        "targets": pa.int32(),
        "value": pa.float32(),
        "second": pa.int32(),
        "file": pa.int32(),
        "line": pa.int64(),
        "words": pa.uint64(),
    }
)

SCHEMA_DTYPES = {field.name: field.type.to_pandas_dtype() for field in SCHEMA}


@dataclass(frozen=True)
class Part:
    """The rows of one record batch, as arrays without copies.

    first: number of its first row. bounds: the tokens of its row i are [bounds[i], bounds[i + 1]).
    labels: None if `trained` determines them. segments: lengths of the segments of all rows, and
    `segment_bounds` as `bounds`; None if every row is one segment.
    """

    first: int
    bounds: NDArray[np.int32]
    ids: NDArray[np.int32]
    trained: NDArray[np.uint8]
    labels: NDArray[np.int32] | None
    segment_bounds: NDArray[np.int32] | None
    segments: NDArray[np.int32] | None

    def segment_sizes(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the number of segments of each row, and the length of its longest one."""
        lengths = np.diff(self.bounds)
        if self.segments is None or self.segment_bounds is None:
            return np.ones_like(lengths), lengths
        starts = self.segment_bounds[:-1]
        return np.diff(self.segment_bounds), np.maximum.reduceat(self.segments, starts)


class EncodedRows:
    """Token ids and labels of rows, by the number of the row.

    names: short names of the files that rows are from. lengths, targets: number of tokens and of
    trained tokens of each row. num_segments, longest: number of segments of each row, and length of
    its longest one. values, second: as the columns. files, lines: where each row is from. words:
    digest of each row's words.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], names: Sequence[str]) -> None:
        self.names = tuple(names)
        batches = [batch for batch in batches if batch.num_rows]
        self.parts: list[Part] = []
        first = 0
        for batch in batches:
            self.parts.append(_part(batch, first))
            first += batch.num_rows
        self._firsts = [part.first for part in self.parts]
        self._num_rows = first
        self.lengths = _joined([np.diff(part.bounds) for part in self.parts], np.int32)
        segment_sizes = [part.segment_sizes() for part in self.parts]
        self.num_segments, self.longest = (
            _joined([sizes[index] for sizes in segment_sizes], np.int32) for index in (0, 1)
        )
        self.targets, self.values, self.second, self.files, self.lines, self.words = (
            _joined([batch.column(name).to_numpy() for batch in batches], SCHEMA_DTYPES[name])
            for name in ("targets", "value", "second", "file", "line", "words")
        )

    def __len__(self) -> int:
        return self._num_rows

    def ids(self, row: int, start: int = 0, length: int | None = None) -> NDArray[np.int32]:
        """Return the token ids of a row, or `length` of them from `start` on.

        A part of a row with a value (a labelled text that is cut) ends with the row's last token:
        encoders end a text with a special token, and decoders predict from the last one.
        """
        part, tokens = self._find(row, start, length)
        ids = part.ids[tokens]
        if length is None or length == self.lengths[row] or np.isnan(self.values[row]):
            return ids
        last = part.bounds[row - part.first + 1] - 1
        return np.append(ids[:-1], part.ids[last])

    def labels(self, row: int, start: int = 0, length: int | None = None) -> NDArray[np.int32]:
        """Return the labels of a row, or `length` of them from `start` on."""
        part, tokens = self._find(row, start, length)
        if part.labels is not None:
            return part.labels[tokens]
        return np.where(part.trained[tokens], part.ids[tokens], np.int32(IGNORE_INDEX))

    def trained(self, row: int, start: int = 0, length: int | None = None) -> NDArray[np.bool_]:
        """Return for each token of a row, or of a part of it, whether it is trained."""
        part, tokens = self._find(row, start, length)
        if part.labels is None:
            return part.trained[tokens].astype(np.bool_)
        is_trained: NDArray[np.bool_] = part.labels[tokens] != IGNORE_INDEX
        return is_trained

    def segments(self, row: int) -> tuple[int, ...]:
        """Return the lengths of a row's segments; empty if the row is one segment."""
        part = self.parts[bisect_right(self._firsts, row) - 1]
        if part.segments is None or part.segment_bounds is None:
            return ()
        start, stop = part.segment_bounds[row - part.first : row - part.first + 2].tolist()
        return tuple(part.segments[start:stop].tolist())

    def origin(self, row: int) -> str:
        """Return file and line of a row."""
        return f"{self.names[self.files[row]]}:{self.lines[row]}"

    def _find(self, row: int, start: int, length: int | None) -> tuple[Part, slice]:
        part = self.parts[bisect_right(self._firsts, row) - 1]
        begin, end = part.bounds[row - part.first : row - part.first + 2].tolist()
        stop = end if length is None else begin + start + length
        return part, slice(begin + start, stop)


def _part(batch: pa.RecordBatch, first: int) -> Part:
    names = ("input_ids", "trained", "labels", "segments")
    ids, trained, labels, segments = (batch.column(name) for name in names)
    is_split = not segments.null_count
    return Part(
        first,
        ids.offsets.to_numpy(),
        ids.values.to_numpy(),
        trained.values.to_numpy(),
        None if labels.null_count else labels.values.to_numpy(),
        segments.offsets.to_numpy() if is_split else None,
        segments.values.to_numpy() if is_split else None,
    )


def _joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays])
