"""Files and datasets as numbered rows: one reader for each kind, which never stops at a bad row.

A row's number is the line that it begins on, because that is what an editor can jump to; Parquet
and the hub count rows from 1. A fault of the text ends only a file whose rest cannot be read.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_cli.data.row_errors import RowError
from qlora_cli.errors import InputError

Item = tuple[int, dict[str, Any] | RowError]
"""A line or row number and what stands there, or what is wrong with it."""

_LONGEST_CELL = 2**31 - 1


def _jsonl(path: Path) -> Iterator[Item]:
    """Split at newlines only: U+2028 and its like may stand inside a JSON text."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, _object(json.loads(text, object_pairs_hook=_no_duplicates))
            except json.JSONDecodeError as error:
                yield number, RowError(f"broken JSON at column {error.colno}: {error.msg}")
            except UnicodeDecodeError as error:
                yield number, _not_utf8(error)
            except RowError as fault:
                yield number, fault


def _json(path: Path) -> Iterator[Item]:
    """A list of objects, or objects one behind the other; each counts by the line it begins on."""
    with _opened(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, _not_utf8(error)
        return
    yield from _json_values(text)


def _json_values(text: str) -> Iterator[Item]:
    """One by one, because a list that is decoded at once does not say where its rows stand."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates)
    at = _skip_space(text, 0)
    listed = text.startswith("[", at)
    at = _skip_space(text, at + 1) if listed else at
    line, seen = 1, 0
    while at < len(text) and not (listed and text[at] == "]"):
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, RowError(f"broken JSON at column {error.colno}: {error.msg}")
            return
        except RowError as fault:  # a key twice; where that object ends is not known
            yield line, fault
            return
        try:
            yield line, _object(value)
        except RowError as fault:
            yield line, fault
        at = _skip_space(text, at)
        if listed and text.startswith(",", at):
            at = _skip_space(text, at + 1)
        elif listed and not text.startswith("]", at):
            break
    if listed and text[at:].rstrip() != "]":
        yield (
            text.count("\n", 0, at) + 1,
            RowError("broken JSON: the list does not end as it should"),
        )


def _skip_space(text: str, at: int) -> int:
    space = re.compile(r"\s*").match(text, at)
    assert space is not None
    return space.end()


def _csv(path: Path, delimiter: str = ",") -> Iterator[Item]:
    # The module's own limit of 128 KiB a cell is shorter than many a document.
    csv.field_size_limit(_LONGEST_CELL)
    begins = 1
    try:
        with _readable(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            columns = list(reader.fieldnames or ())
            if not columns:
                return
            if len(set(columns)) < len(columns):
                yield 1, RowError("two columns have the same name")
                return
            begins = reader.line_num + 1
            for fields in reader:
                yield begins, _cells(fields, columns)
                begins = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield begins, _not_utf8(error)
    except csv.Error as error:
        yield begins, RowError(f"broken CSV: {error}")


def _cells(fields: dict[Any, Any], columns: list[str]) -> dict[str, Any] | RowError:
    if None in fields or None in fields.values():
        return RowError(f"it has not as many cells as there are columns ({len(columns)})")
    return fields


def _tsv(path: Path) -> Iterator[Item]:
    return _csv(path, delimiter="\t")


def _parquet(path: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(_readable(path))
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1000))
        rows = (fields for batch in batches for fields in batch)
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"not a readable Parquet file: {error}", where=str(path)) from error


def read_hub(name: str, split: str) -> Iterator[Item]:
    """The rows of a dataset's split. Raises InputError where the hub does not give it."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
        yield from enumerate((dict(fields) for fields in rows), 1)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ImportError) as error:
        summary = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name!r} is no file here, and the hub does not give its split {split!r}: {summary}",
            hint="check the name, the split (owner/name:split) and the network; log in for a "
            "gated dataset (`hf auth login`)",
        ) from error


def _readable(path: Path) -> Path:
    _opened(path).close()
    return path


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"a row is an object with fields, and this is {_kind(value)}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(r"it holds half a character (a lone \ud800-\udfff)") from error
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(f"the key {twice!r} stands in it twice")
    return fields


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    return RowError(f"not UTF-8 (byte 0x{error.object[error.start]:02x})", "save it as UTF-8")


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""By the ending of a file's name. Each raises InputError on a file that cannot be opened."""
