"""Read rows from files, hub datasets or the starter, each with the place it comes from.

All faults of the files are found in one pass and reported in one error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qlora_cli.data.row_errors import RowError, rows_error
from qlora_cli.data.sources import Opened, open_sources
from qlora_cli.errors import DataError, Problem


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


def read_rows(
    where: str, limit: int | None = None, *, columns: Mapping[str, str] | None = None
) -> list[Row]:
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
) -> list[list[Row]]:
    """Return the rows of each place. Errors and `limit` as of `read_rows`.

    columns: names of fields -> names of the columns that they are read from. A row without any of
    these columns stays as it is, so that files with and without them can be mixed.
    """
    problems: list[Problem] = []
    result: list[list[Row]] = []
    for sources in open_sources(places):
        rows: list[Row] = []
        for source in sources:
            _read(source, columns or {}, limit, rows, problems)
        result.append(rows)
    number = sum(map(len, result))
    if problems:
        raise rows_error(problems, number + len(problems))
    _check_fields([row for rows in result for row in rows[:1]], columns or {})
    if not number:
        names = ", ".join(source.name for sources in open_sources(places) for source in sources)
        raise DataError("no rows to train on", [Problem(names, "it contains no rows")])
    return result


def _read(
    source: Opened,
    columns: Mapping[str, str],
    limit: int | None,
    rows: list[Row],
    problems: list[Problem],
) -> None:
    """Add the rows of one file to `rows` and its faults to `problems`."""
    for number, item in islice(source.read(), limit):
        origin = f"{source.name}:{number}"
        try:
            if isinstance(item, RowError):
                raise item
            rows.append(Row(origin, _renamed(item, columns) if columns else item))
        except RowError as error:
            problems.append(error.problem(origin))


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
