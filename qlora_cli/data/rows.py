"""Read rows from files, hub datasets or the starter, each with the place it comes from.

All faults of the files are found in one pass and reported in one error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qlora_cli.data.formats import format_of
from qlora_cli.data.row_errors import RowError, RowProblems
from qlora_cli.data.row_store import Row, Rows, RowStore
from qlora_cli.data.sources import Opened, open_sources
from qlora_cli.errors import DataError, Problem
from qlora_cli.events import Observer, Silent

_SILENT = Silent()
_LARGE = 64
"""Size of all files in MB from which on the progress of reading is reported."""
_BETWEEN_REPORTS = 10_000
"""Rows between two reports of progress."""


def read_rows(
    where: str, limit: int | None = None, *, columns: Mapping[str, str] | None = None
) -> Rows:
    """Return the rows of one place.

    where: path of a file, folder or pattern; `owner/name` or `owner/name:split` of a hub dataset
    (the default split is `train`); `starter:train` or `starter:held_out`.
    limit: maximum number of rows to read of each file. columns: as of `read_places`.
    Raises InputError if a file or dataset does not exist or cannot be read, DataError listing
    every broken row, and DataError if there are no rows.
    """
    return read_places([where], columns=columns, limit=limit)[0]


def read_places(
    places: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    folder: Path | None = None,
    observer: Observer = _SILENT,
) -> list[Rows]:
    """Return the rows of each place. Errors and `limit` as of `read_rows`.

    columns: names of fields -> names of the columns that they are read from. A row without any of
    these columns stays as it is, so that files with and without them can be mixed.
    folder: for the temporary file of many rows. observer: receives the progress of large files as
    the stage `read`, in MB.
    """
    store, problems = RowStore(folder), RowProblems()
    opened = open_sources(places)
    megabytes = sum(source.size for sources in opened for source in sources) // 10**6
    if megabytes < _LARGE:
        observer = _SILENT
    observer.stage("read", megabytes)
    result: list[Rows] = []
    for sources in opened:
        first = len(store)
        for source in sources:
            for _ in _read(source, columns or {}, limit, store, problems):
                # Pickled rows are about as large as the rows in the file.
                observer.advance(min(store.num_bytes // 10**6, megabytes))
        result.append(Rows(store, np.arange(first, len(store))))
    problems.raise_if_any(len(store) + problems.number)
    _check_fields([row for rows in result for row in rows[:1]], columns or {})
    if not len(store):
        names = ", ".join(source.name for sources in opened for source in sources)
        raise DataError("no rows to train on", [Problem(names, "it contains no rows")])
    return result


def _read(
    source: Opened,
    columns: Mapping[str, str],
    limit: int | None,
    store: RowStore,
    problems: RowProblems,
) -> Iterator[None]:
    """Add the rows of one file to `store` and its faults to `problems`. Yield now and then."""
    for count, (number, item) in enumerate(islice(source.read(), limit), 1):
        if count % _BETWEEN_REPORTS == 0:
            yield
        try:
            if isinstance(item, RowError):
                raise item
            fields = _renamed(item, columns) if columns else item
            store.add(source.name, number, fields, format_of(fields))
        except RowError as error:
            problems.add(f"{source.name}:{number}", error)


def _check_fields(first_rows: list[Row], columns: Mapping[str, str]) -> None:
    """Raise DataError if a field of `data.columns` is in no place after renaming."""
    for name, column in columns.items():
        if first_rows and not any(name in row.fields for row in first_rows):
            row = first_rows[0]
            what = f"no column {column!r}; the row has {', '.join(map(repr, row.fields)) or 'none'}"
            raise DataError(
                "data.columns names a column that does not exist:", [Problem(row.origin, what)]
            )


def _renamed(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields with the names of the format. Raises RowError if a column is missing."""
    present = {name: column for name, column in columns.items() if column in fields}
    missing = [
        column for name, column in columns.items() if column not in fields and name not in fields
    ]
    if missing and present:
        raise RowError(
            f"no column {missing[0]!r}; the row has {', '.join(map(repr, fields)) or 'none'}",
            "change data.columns",
        )
    others = {key: value for key, value in fields.items() if key not in present.values()}
    return others | {name: fields[column] for name, column in present.items()}
