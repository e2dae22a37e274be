"""Read files and datasets as numbered rows: one reader per file type.

A reader does not stop at a broken row: it yields a RowError in its place and continues if the rest
of the file can be read. The number of a row is the line that it begins on, to which an editor can
jump. Rows of Parquet files and hub datasets are counted from 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_cli.data.compression import COMPRESSED, damage_reported, open_file
from qlora_cli.data.delimited import Item, not_utf8, read_csv, read_tsv
from qlora_cli.data.row_errors import RowError
from qlora_cli.errors import InputError

_SNIFFED = 4096
"""Bytes of a file's beginning that decide how it is read."""
_BOM = b"\xef\xbb\xbf"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape sequence in JSON of one half of a character outside the basic plane."""


def _jsonl(path: Path) -> Iterator[Item]:
    """Yield the rows of a file with one JSON object per line; or of a JSON list in such a file."""
    with open_file(path) as file:
        start = file.read(_SNIFFED).removeprefix(_BOM).lstrip()
    if start.startswith(b"[") and start[1:].lstrip()[:1] in (b"{", b"]", b""):
        yield from _json(path)
        return
    # Bytes are split at newlines only; U+2028 and similar may occur inside JSON strings.
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    value = json.loads(text, object_pairs_hook=_no_duplicates)
                    # A line in UTF-8 can contain a half character only as an escape sequence.
                    yield number, _object(value, check=bool(_HALF.search(text)))
            except json.JSONDecodeError as error:
                yield number, RowError(f"broken JSON at column {error.colno}: {error.msg}")
            except UnicodeDecodeError as error:
                yield number, not_utf8(error)
            except RowError as fault:
                yield number, fault
            except (ValueError, RecursionError) as error:
                yield number, _too_large(error)


def _json(path: Path) -> Iterator[Item]:
    """Yield the rows of a JSON file: a list of objects, or objects one after another."""
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, not_utf8(error)
        return
    yield from _json_values(text)


def _json_values(text: str) -> Iterator[Item]:
    """Yield the rows of a JSON text, decoded one by one to get the line of each."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates)
    at = _skip_space(text, 0)
    is_list = text.startswith("[", at)
    at = _skip_space(text, at + 1) if is_list else at
    line, counted = 1, 0
    while at < len(text) and not (is_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, RowError(f"broken JSON at column {error.colno}: {error.msg}")
            return
        except RowError as fault:  # duplicate key; the end of the object is unknown
            yield line, fault
            return
        except (ValueError, RecursionError) as error:
            yield line, _too_large(error)
            return
        try:
            yield line, _object(value)
        except RowError as fault:
            yield line, fault
        at = _skip_space(text, at)
        if is_list and text.startswith(",", at):
            at = _skip_space(text, at + 1)
        elif is_list and not text.startswith("]", at):
            break
    if is_list and text[at:].rstrip() != "]":
        yield (
            text.count("\n", 0, at) + 1,
            RowError("broken JSON: the list does not end with ]"),
        )


def _skip_space(text: str, at: int) -> int:
    """Return the index of the first character from `at` on that is not white space."""
    space = re.compile(r"\s*").match(text, at)
    assert space is not None
    return space.end()


def _text(path: Path) -> Iterator[Item]:
    """Yield the complete file as one row of the format `text`; no row if it is blank."""
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, not_utf8(error)
        return
    if text.strip():
        yield 1, {"text": text}


def _parquet(path: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(_readable(path))
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1000))
        rows = (fields for batch in batches for fields in batch)
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"not a readable Parquet file: {error}", where=str(path)) from error


def _readable(path: Path) -> Path:
    """Return the path. Raises InputError if the file cannot be opened."""
    open_file(path).close()
    return path


def _object(value: Any, check: bool = True) -> dict[str, Any]:
    """Return a decoded row. Raises RowError if it is not an object of valid Unicode.

    check: False if all its texts are known to be valid Unicode.
    """
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object with fields, not {_kind(value)}")
    try:
        if check:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(r"it contains half a character (a lone \ud800-\udfff)") from error
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Raises RowError if a key occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        duplicate = next(key for key, count in counts.items() if count > 1)
        raise RowError(f"the key {duplicate!r} occurs twice")
    return fields


def _too_large(error: Exception) -> RowError:
    """Return the fault of a row whose JSON is valid and cannot be decoded."""
    if isinstance(error, RecursionError):
        return RowError("its lists or objects are nested too deeply")
    return RowError("it contains a number with too many digits")


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
"""Suffix of a file's name -> its reader, which raises InputError if the file cannot be read."""

TEXT_SUFFIXES = (".txt", ".md")
"""Suffixes of files that are one row of text."""


def file_type(path: Path) -> str | None:
    """Return the key of a file's reader in `READERS`; None if there is none for its name.

    The suffix of a compression (`.gz`, `.zst`) is left out.
    """
    is_compressed = path.suffix.lower() in COMPRESSED
    suffix = (path.with_suffix("") if is_compressed else path).suffix.lower()
    readable = suffix in READERS and not (is_compressed and suffix == ".parquet")
    return suffix if readable else None


def read_file(path: Path) -> Iterator[Item]:
    """Yield the rows of a file whose `file_type` is known.

    Raises InputError if the file cannot be read or its compressed data is damaged.
    """
    suffix = file_type(path)
    assert suffix is not None
    with damage_reported(path):
        yield from READERS[suffix](path)
