"""Examples as record batches of an Arrow table, whose columns `encoded.py` describes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qlora_cli.data.encode import Example
from qlora_cli.data.encoded import SCHEMA
from qlora_cli.nn.labels import IGNORE_INDEX

_NO_VALUE = float("nan")


def record_batch(
    examples: Sequence[Example],
    files: NDArray[np.int32],
    lines: NDArray[np.int64],
    words: Sequence[int],
) -> pa.RecordBatch:
    """Return examples as one record batch. files, lines, words: of each example."""
    lengths = [len(example.ids) for example in examples]
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    ids = _flat([example.ids for example in examples], bounds[-1])
    labels = _flat([example.labels for example in examples], bounds[-1])
    is_trained = labels != IGNORE_INDEX
    own_ids = bool(np.array_equal(labels[is_trained], ids[is_trained]))
    columns = [
        _lists(bounds, ids),
        _lists(bounds, is_trained.astype(np.uint8)),
        pa.nulls(len(examples), SCHEMA.field("labels").type) if own_ids else _lists(bounds, labels),
        _segments(examples),
        pa.array([example.num_targets for example in examples], pa.int32()),
        pa.array([_NO_VALUE if e.value is None else e.value for e in examples], pa.float32()),
        pa.array([example.second for example in examples], pa.int32()),
        pa.array(files, pa.int32()),
        pa.array(lines, pa.int64()),
        pa.array(words, pa.uint64()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _flat(rows: Sequence[Sequence[int]], length: int) -> NDArray[np.int32]:
    return np.fromiter(chain.from_iterable(rows), np.int32, length)


def _segments(examples: Sequence[Example]) -> pa.Array:
    if not any(example.segments for example in examples):
        return pa.nulls(len(examples), SCHEMA.field("segments").type)
    lengths = [example.segments or (len(example.ids),) for example in examples]
    bounds = np.cumsum([0, *map(len, lengths)], dtype=np.int32)
    return _lists(bounds, np.array([n for row in lengths for n in row], np.int32))


def _lists(bounds: NDArray[np.int32], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(bounds), pa.array(values))
