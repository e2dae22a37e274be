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


class RowProblems:
    """The faulty rows of some data: their number, and the first of them. number: faulty rows."""

    def __init__(self) -> None:
        self.number = 0
        self.first: list[Problem] = []

    def add(self, origin: str, error: RowError) -> None:
        """Add the error of the row at `origin`."""
        self.number += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(error.problem(origin))

    def raise_if_any(self, num_rows: int, use: str = "") -> None:
        """Raise one DataError that counts the faulty rows and lists the first, if there are any.

        num_rows: number of rows read. use: what the rows cannot be used as, for example
        "as completion rows".
        """
        if not self.number:
            return
        counts = f"{format_count(self.number)} of {format_count(num_rows)}"
        what = f"{counts} rows cannot be used{f' {use}' if use else ''}"
        if self.number > SHOWN_PROBLEMS:
            what += f"; the first {SHOWN_PROBLEMS}"
        raise DataError(f"{what}:", self.first)


class FieldsError(RowError):
    """The fields or values of a row are not of its format."""


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
