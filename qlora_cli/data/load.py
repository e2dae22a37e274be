"""The one path from data files to examples: choose rows, detect their format, encode, fit lengths.

Training, `qlora data`, evaluation and verification all call this module, so they accept and refuse
the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol

from qlora_cli.data.encode import Example, encode
from qlora_cli.data.formats import detect_format
from qlora_cli.data.long_rows import LongRowsReport, fit_rows, policy_of
from qlora_cli.data.mixture import SourceCount, read_data, read_held_out
from qlora_cli.data.rows import Row, read_rows
from qlora_cli.data.system_prompt import add_system, writes_system
from qlora_cli.errors import DataError, Problem
from qlora_cli.events import Observer, Silent
from qlora_cli.recipe.schema import Data, DataFormat
from qlora_cli.units import format_count

_SILENT = Silent()


class Encode(Protocol):
    """A function that turns rows into examples: `encode`, or the `encode` of a task."""

    def __call__(
        self,
        rows: list[Row],
        format: DataFormat,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Example]:
        """Return one example per row, in order. Arguments and errors as of `encode`."""
        ...


@dataclass(frozen=True)
class ModelLimits:
    """What a model can read. None means that the limit is not known or does not exist.

    vocab_size: token ids are smaller than it. positions: maximum number of tokens in a row.
    """

    vocab_size: int | None = None
    positions: int | None = None

    @classmethod
    def of(cls, config: Any) -> ModelLimits:
        """Return the limits in a transformers config."""
        return cls(config.vocab_size, getattr(config, "max_position_embeddings", None))


@dataclass(frozen=True)
class LoadedRows:
    """Rows as examples that a model can read.

    format: of the rows; of most of them if the sources have different formats. long_rows: what was
    done with rows that were too long. A split row is several examples.
    """

    format: DataFormat
    examples: list[Example]
    long_rows: LongRowsReport


@dataclass(frozen=True)
class LoadedData:
    """The training rows and the held-out rows of a recipe.

    held_out: None if `data.eval` is null. sources: of the training rows. notes: one line for the
    user per choice or loss of rows.
    """

    train: LoadedRows
    held_out: LoadedRows | None
    sources: tuple[SourceCount, ...]
    notes: tuple[str, ...]


def load_data(
    data: Data,
    tokenizer: Any,
    limits: ModelLimits,
    *,
    encode: Encode = encode,
    observer: Observer = _SILENT,
) -> LoadedData:
    """Return the rows of a recipe as examples. Other arguments and errors as of `load_examples`.

    observer: receives the number of tokenized rows, as the stage `tokenize`.
    """
    rows = read_data(data)
    observer.stage("tokenize", len(rows.train) + len(rows.held_out))
    train = _encoded(rows.train, data, tokenizer, limits, encode, observer.advance)
    held_out = None
    if data.eval is not None:
        held_out = _encoded(
            rows.held_out,
            data,
            tokenizer,
            limits,
            encode,
            lambda done: observer.advance(len(rows.train) + done),
        )
    notes = rows.notes(data)
    if data.system and not writes_system(tokenizer):
        notes.append(
            "the chat template does not write system prompts: data.system is put in front of the "
            "first user message"
        )
    notes += [text for text in [train.long_rows.text()] if text]
    if held_out is not None and (text := held_out.long_rows.text()):
        notes.append(f"held-out rows: {text}")
    return LoadedData(train, held_out, rows.sources, tuple(notes))


def load_train(
    data: Data,
    tokenizer: Any,
    limits: ModelLimits,
    *,
    encode: Encode = encode,
    select: slice = slice(None),
) -> LoadedRows:
    """Return the training rows of a recipe. Arguments and errors as of `load_examples`."""
    return _encoded(read_data(data).train[select], data, tokenizer, limits, encode)


def load_held_out(
    data: Data,
    tokenizer: Any,
    limits: ModelLimits,
    *,
    encode: Encode = encode,
    select: slice = slice(None),
) -> LoadedRows:
    """Return the held-out rows of a recipe. Arguments and errors as of `load_examples`.

    Raises DataError if `data.eval` is null.
    """
    return _encoded(read_held_out(data)[select], data, tokenizer, limits, encode)


def load_examples(
    where: str,
    data: Data,
    tokenizer: Any,
    limits: ModelLimits,
    *,
    encode: Encode = encode,
    select: slice = slice(None),
) -> LoadedRows:
    """Return the rows of a file or dataset as examples, in order.

    where: as in `read_rows`. data: the recipe's section, for the format, columns and lengths.
    tokenizer: the base's; None if it has none. limits: of the model that reads the rows.
    encode: the task's function. select: the part of the rows to encode.
    Raises InputError if the file cannot be read, DataError listing every row that cannot be used,
    ModelError if the tokenizer cannot encode the format.
    """
    rows = read_rows(where, columns=data.columns)[select]
    return _encoded(rows, data, tokenizer, limits, encode)


def _encoded(
    rows: list[Row],
    data: Data,
    tokenizer: Any,
    limits: ModelLimits,
    encode: Encode,
    on_progress: Callable[[int], None] | None = None,
) -> LoadedRows:
    limit = data.seq_len if limits.positions is None else min(data.seq_len, limits.positions)
    report = LongRowsReport(limit)
    examples: list[Example] = []
    counts: dict[DataFormat, int] = {}
    for row_format, part in _by_format(rows, data):
        if data.system:
            part = add_system(part, row_format, tokenizer, data.system)
        encoded = encode(
            part,
            row_format,
            tokenizer,
            vocab_size=limits.vocab_size,
            on_progress=_after(report.rows, on_progress),
        )
        examples += fit_rows(encoded, policy_of(data.long_rows, row_format), report)
        counts[row_format] = counts.get(row_format, 0) + len(part)
    if not examples:
        raise _nothing_left(report)
    return LoadedRows(max(counts, key=lambda name: counts[name]), examples, report)


def _after(done: int, on_progress: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """Return a function that reports progress after `done` rows of other formats."""
    return None if on_progress is None else lambda number: on_progress(done + number)


def _by_format(rows: list[Row], data: Data) -> list[tuple[DataFormat, list[Row]]]:
    """Return consecutive rows of one format together. Each file has one format."""
    parts: list[tuple[DataFormat, list[Row]]] = []
    by_file: dict[str, list[Row]] = {}
    for row in rows:
        by_file.setdefault(row.file, []).append(row)
    formats = {name: detect_format(part, data.format) for name, part in by_file.items()}
    for name, part in groupby(rows, key=attrgetter("file")):
        if parts and parts[-1][0] == formats[name]:
            parts[-1][1].extend(part)
        else:
            parts.append((formats[name], list(part)))
    return parts


def _nothing_left(report: LongRowsReport) -> DataError:
    if not report.rows:
        return DataError("no rows to train on", [Problem("data", "no row was selected")])
    return DataError(
        f"no row is left: all {format_count(report.rows)} rows are longer than "
        f"{format_count(report.limit)} tokens and cannot be used (data.long_rows):",
        [Problem(origin, f"{format_count(tokens)} tokens") for origin, tokens in report.first],
        hint=f"the longest row has {format_count(report.longest)} tokens; raise data.seq_len up to "
        "the model's positions, or set data.long_rows to split or truncate",
    )
