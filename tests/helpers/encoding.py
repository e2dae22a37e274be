"""Encode rows in one go, and rows as the tables that the package works with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_cli.data.encode import Example
from qlora_cli.data.encode import encode as encode_rows
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.examples import Examples
from qlora_cli.data.formats import Content, content_of
from qlora_cli.data.record_batch import record_batch
from qlora_cli.data.row_errors import FieldsError, RowError
from qlora_cli.data.row_store import Row, Rows, RowStore
from qlora_cli.data.stream import Encoder, record_batches
from qlora_cli.data.text_checks import RowFaults
from qlora_cli.recipe.schema import DataFormat


def stored(rows: Sequence[Row]) -> Rows:
    """Return rows in a store."""
    store = RowStore()
    for row in rows:
        name, _, line = row.origin.rpartition(":")
        store.add(name, int(line), row.fields, None)
    return Rows(store, np.arange(len(rows)))


def encode(
    rows: Sequence[Row], format: DataFormat, tokenizer: Any, *, vocab_size: int | None = None
) -> list[Example]:
    """Return the example of each row. Raises DataError listing every row that has an error."""
    kept = stored(rows)
    encoder = Encoder(encode_rows, tokenizer, vocab_size, None)
    batches = record_batches(
        [(format, kept)], lambda jobs: map(encoder, jobs), lambda _: None, RowFaults()
    )
    return list(Examples.whole(EncodedRows(list(batches), kept.store.names)))


def parse_rows(
    rows: Sequence[Row], format: DataFormat, *, has_chat_template: bool = False
) -> list[Content]:
    """Return the content of each row. Raises DataError listing every row that has an error."""
    contents = [content_of(row, format, has_chat_template=has_chat_template) for row in rows]
    if any(isinstance(content, RowError) for content in contents):
        encode(rows, format, None)
    return [content for content in contents if not isinstance(content, FieldsError)]


def examples_of(examples: Sequence[Example]) -> Examples:
    """Return examples, whose origins are `NAME:LINE`, as complete rows of a table."""
    origins = [example.origin.rpartition(":") for example in examples]
    names = list(dict.fromkeys(name for name, _, _ in origins))
    files = np.array([names.index(name) for name, _, _ in origins], np.int32)
    lines = np.array([int(line) for _, _, line in origins], np.int64)
    batches = [record_batch(examples, files, lines, [0] * len(examples))] if examples else []
    return Examples.whole(EncodedRows(batches, names))
