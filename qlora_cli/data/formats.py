"""Rows from a file or the hub, each with its place, and what format they are in.

Every fault of a file is found in one reading and reported in one error.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from qlora_cli.data.messages import PRECEDENCE, REQUIRED, RowFault, check_fields
from qlora_cli.data.readers import READERS, Item, read_hub
from qlora_cli.errors import DataError, InputError, Problem
from qlora_cli.files.locate import STARTER, STARTER_FOLDER
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.units import format_count

SHOWN_PROBLEMS = 10
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True)
class Row:
    """One row as it was written. origin: `rows.jsonl:42`, the file and the line it begins on."""

    origin: str
    fields: dict[str, Any]


def read_rows(where: str, limit: int | None = None) -> list[Row]:
    """The rows of a JSONL, JSON, CSV, TSV or Parquet file, a hub dataset or `starter:train`.

    limit: read no further than that many rows. A hub dataset is `owner/name` or
    `owner/name:split`; without a split it is `train`.
    Raises InputError where there is no such file or dataset, DataError on broken rows (all of
    them) and where there is no row at all.
    """
    name, items = _open(where)
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, found in islice(items, limit):
        origin = f"{name}:{number}"
        if isinstance(found, RowFault):
            problems.append(Problem(origin, str(found), found.hint))
        else:
            rows.append(Row(origin, found))
    if problems:
        raise rows_error(problems, len(rows) + len(problems))
    if not rows:
        raise DataError("no rows to train on", [Problem(name, "there is not one row in it")])
    return rows


def detect_format(rows: list[Row], wanted: Literal["auto"] | DataFormat) -> DataFormat:
    """The one format that the rows are in; `auto` goes by their fields, the most frequent wins.

    Raises DataError naming every row that is not in that format.
    """
    found = _most_frequent(rows) if wanted == "auto" else wanted
    problems = []
    for row in rows:
        try:
            check_fields(row.fields, found)
        except RowFault as fault:
            problems.append(Problem(row.origin, str(fault), fault.hint))
    if problems:
        raise rows_error(problems, len(rows), f"as {found} rows")
    return found


def rows_error(problems: list[Problem], num_rows: int, use: str = "") -> DataError:
    """One error for many faulty rows: how many of how many, and the first of them."""
    counts = f"{format_count(len(problems))} of {format_count(num_rows)}"
    what = f"{counts} rows cannot be used{f' {use}' if use else ''}"
    if len(problems) > SHOWN_PROBLEMS:
        what += f"; the first {SHOWN_PROBLEMS}"
    return DataError(f"{what}:", problems[:SHOWN_PROBLEMS])


def _most_frequent(rows: list[Row]) -> DataFormat:
    votes = Counter(_by_fields(row.fields) for row in rows)
    del votes[None]
    if votes:
        return cast(DataFormat, votes.most_common(1)[0][0])
    known = "; ".join(f"{name}: {', '.join(REQUIRED[name])}" for name in PRECEDENCE)
    first = rows[0]
    raise DataError(
        "the rows are in no known format",
        [Problem(first.origin, f"its fields are {', '.join(first.fields) or 'none'}")],
        hint=f"rename the fields to those of one format ({known})",
    )


def _by_fields(fields: dict[str, Any]) -> DataFormat | None:
    for name in PRECEDENCE:
        if all(fields.get(key) is not None for key in REQUIRED[name]):
            return name
    return None


def _open(where: str) -> tuple[str, Iterator[Item]]:
    """The name that origins begin with, and the items; nothing is read yet."""
    prefix = f"{STARTER}:"
    if where.startswith(prefix):
        path = STARTER_FOLDER / f"{where.removeprefix(prefix)}.jsonl"
        if not path.is_file():
            raise InputError(
                f"no rows named {where!r}", hint="there are starter:train and starter:held_out"
            )
        return path.name, READERS[path.suffix](path)
    path = Path(where).expanduser()
    reader = READERS.get(path.suffix.lower())
    hub = _HUB_ID.fullmatch(where)
    if path.is_file() and reader is None:
        raise InputError(
            f"{path} is of no known kind", hint=f"a file's name ends in {', '.join(READERS)}"
        )
    if reader is not None and path.is_file():
        return path.name, reader(path)
    if hub and reader is None and not path.is_dir():
        return where, read_hub(hub["name"], hub["split"] or "train")
    raise InputError(_missing(path), hint=_nearby(path))


def _missing(path: Path) -> str:
    return f"{path} is a folder; name a file in it" if path.is_dir() else f"no file {path}"


def _nearby(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"{folder} is no folder either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS)
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    found = ", ".join(str(folder / name) for name in near)
    return f"in {folder} there is {found}" if near else f"{folder} holds no file with rows"
