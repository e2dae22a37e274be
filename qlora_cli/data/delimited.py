"""Read CSV and TSV files as numbered rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qlora_cli.data.compression import open_file
from qlora_cli.data.row_errors import RowError

Item = tuple[int, dict[str, Any] | RowError]
"""The line or row number, and the row's fields or its error."""

_MAX_CELL_LENGTH = 2**31 - 1


def read_csv(
    path: Path, delimiter: str | None = None, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[Item]:
    """Yield the rows of a CSV file with a header line.

    delimiter: None reads it from the header line, which must not contain a comma if the delimiter
    is a semicolon. quoting: a constant of the csv module.
    """
    # The csv module's default limit of 128 KiB per cell is too small for documents.
    csv.field_size_limit(_MAX_CELL_LENGTH)
    row_line = 1
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
            lines = _Lines(file)
            delimiter = delimiter or _delimiter(lines.first)
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True, quoting=quoting)
            columns = list(reader.fieldnames or ())
            if not columns:
                return
            if len(set(columns)) < len(columns):
                yield 1, RowError("two columns have the same name")
                return
            row_line = reader.line_num + 1
            for fields in reader:
                yield row_line, _cells(fields, columns)
                row_line = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield row_line, not_utf8(error)
    except csv.Error as error:
        yield row_line, RowError(f"broken CSV: {error}")


class _Lines:
    """The lines of a file, of which the first can be read in advance."""

    def __init__(self, file: Iterator[str]) -> None:
        self.first = next(file, "")
        self._file = file
        self._is_first = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._is_first and self.first:
            self._is_first = False
            return self.first
        return next(self._file)


def _delimiter(header: str) -> str:
    return ";" if ";" in header and "," not in header else ","


def _cells(fields: dict[Any, Any], columns: list[str]) -> dict[str, Any] | RowError:
    if None in fields or None in fields.values():
        return RowError(f"the number of cells differs from the number of columns ({len(columns)})")
    return fields


def read_tsv(path: Path) -> Iterator[Item]:
    """Yield the rows of a TSV file, of which the cells are quoted or, as in GLUE, are not.

    A quote that is a character of the text would join lines or be an error if it began a cell.
    """
    with open_file(path) as file:
        counts = {line.count(b"\t") for line in file if line.strip(b"\r\n")}
        file.seek(0)
        has_quotes = any(b'"' in line for line in file)
    if not has_quotes or len(counts) != 1:
        return read_csv(path, delimiter="\t")
    with open_file(path) as file:
        is_quoted = all(map(_is_quoted, (cell for line in file for cell in line.split(b"\t"))))
    return read_csv(path, "\t", csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE)


def _is_quoted(cell: bytes) -> bool:
    """Return whether the quotes in a cell of a TSV file are around it, or it has none."""
    text = cell.strip(b"\r\n")
    inner = text[1:-1].replace(b'""', b"")
    is_outer = len(text) > 1 and text[:1] == text[-1:] == b'"'
    return b'"' not in text or (is_outer and b'"' not in inner)


def not_utf8(error: UnicodeDecodeError) -> RowError:
    """Return the fault of a row whose bytes are no UTF-8."""
    return RowError(f"not UTF-8 (byte 0x{error.object[error.start]:02x})", "save it as UTF-8")
