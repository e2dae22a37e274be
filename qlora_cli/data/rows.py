"""Read rows from a file, a hub dataset or the starter, each with the place it comes from.

All faults of a file are found in one pass and reported in one error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_cli.data.readers import READERS, Item, read_hub
from qlora_cli.data.row_errors import RowError, rows_error
from qlora_cli.errors import DataError, InputError, Problem
from qlora_cli.files.locate import STARTER, STARTER_FOLDER

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True)
class Row:
    """One row as it is in the file.

    origin: file and line that the row begins on, for example `rows.jsonl:42`.
    fields: column or key -> value.
    """

    origin: str
    fields: dict[str, Any]


def read_rows(where: str, limit: int | None = None) -> list[Row]:
    """Return the rows of a file, a hub dataset or the starter.

    where: path of a JSONL, JSON, CSV, TSV or Parquet file; `owner/name` or `owner/name:split` of a
    hub dataset (the default split is `train`); `starter:train` or `starter:held_out`.
    limit: maximum number of rows to read.
    Raises InputError if the file or dataset does not exist or cannot be read, DataError listing
    every broken row, and DataError if there are no rows.
    """
    name, items = _open(where)
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, item in islice(items, limit):
        origin = f"{name}:{number}"
        if isinstance(item, RowError):
            problems.append(item.problem(origin))
        else:
            rows.append(Row(origin, item))
    if problems:
        raise rows_error(problems, len(rows) + len(problems))
    if not rows:
        raise DataError("no rows to train on", [Problem(name, "it contains no rows")])
    return rows


def _open(where: str) -> tuple[str, Iterator[Item]]:
    """Return the name that origins begin with, and the items, which are read lazily."""
    if where.startswith(f"{STARTER}:"):
        return _open_starter(where)
    path = Path(where).expanduser()
    reader = READERS.get(path.suffix.lower())
    hub = _HUB_ID.fullmatch(where)
    if path.is_file() and reader is None:
        raise InputError(
            f"unknown file type: {path}", hint=f"supported file names end in {', '.join(READERS)}"
        )
    if reader is not None and path.is_file():
        return path.name, reader(path)
    if hub and reader is None and not path.is_dir():
        return where, read_hub(hub["name"], hub["split"] or "train")
    what = f"{path} is a folder; name a file in it" if path.is_dir() else f"no file {path}"
    raise InputError(what, hint=_similar_files(path))


def _open_starter(where: str) -> tuple[str, Iterator[Item]]:
    path = STARTER_FOLDER / f"{where.removeprefix(f'{STARTER}:')}.jsonl"
    if not path.is_file():
        raise InputError(
            f"no rows named {where!r}", hint="there are starter:train and starter:held_out"
        )
    return path.name, READERS[path.suffix](path)


def _similar_files(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS)
    similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    if not similar:
        return f"{folder} contains no data file"
    return f"{folder} contains {', '.join(str(folder / name) for name in similar)}"
