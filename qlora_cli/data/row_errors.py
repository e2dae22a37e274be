"""Errors of single rows, and the one error that reports all faulty rows of a file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from qlora_cli.errors import DataError, Problem
from qlora_cli.units import format_count

SHOWN_PROBLEMS = 10
"""Maximum number of faulty rows that one error lists."""


class RowError(Exception):
    """One row cannot be used. The caller collects these and raises one DataError for all rows.

    hint: what the user can change; None if the message is enough.
    """

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint

    def problem(self, origin: str) -> Problem:
        """Return this error as a problem of the row at `origin`, for example `rows.jsonl:42`."""
        return Problem(origin, str(self), self.hint)


def rows_error(problems: list[Problem], num_rows: int, use: str = "") -> DataError:
    """Return one DataError that counts the faulty rows and lists the first of them.

    problems: one per faulty row. num_rows: number of rows read. use: what the rows cannot be used
    as, for example "as completion rows".
    """
    counts = f"{format_count(len(problems))} of {format_count(num_rows)}"
    what = f"{counts} rows cannot be used{f' {use}' if use else ''}"
    if len(problems) > SHOWN_PROBLEMS:
        what += f"; the first {SHOWN_PROBLEMS}"
    return DataError(f"{what}:", problems[:SHOWN_PROBLEMS])


def missing_field(
    key: str, fields: dict[str, Any], aliases: Mapping[str, str] | None = None
) -> RowError:
    """Return the RowError for a field that is missing or null, with a rename as its hint.

    aliases: names that other tools use for a field -> the field's name here.
    """
    if key in fields:
        return RowError(f"the field {key!r} is null")
    what = f"no field {key!r}; the row has {', '.join(map(repr, fields)) or 'none'}"
    similar = difflib.get_close_matches(key, fields, n=1)
    similar = similar or [name for name in fields if (aliases or {}).get(name) == key]
    return RowError(what, f"rename {similar[0]!r} to {key!r}" if similar else None)


def check_strings(fields: dict[str, Any], *keys: str) -> None:
    """Raise RowError unless each of these fields is absent, null or a string."""
    for key in keys:
        if not isinstance(fields.get(key, ""), str | None):
            raise RowError(f"{key!r} must be a string")
