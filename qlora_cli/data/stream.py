"""Tokenize rows in a stream: part by part, in several processes if the rows are many.

A part of the rows becomes one record batch. All faulty rows of one format are reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qlora_cli.data.encode import Example, Result
from qlora_cli.data.formats import detect_format
from qlora_cli.data.processes import num_cores
from qlora_cli.data.record_batch import record_batch
from qlora_cli.data.row_errors import FieldsError, RowError, RowProblems
from qlora_cli.data.row_store import Row, Rows, unpickled
from qlora_cli.data.system_prompt import add_system
from qlora_cli.data.text_checks import RowChecker, RowFaults
from qlora_cli.data.tool_calls import ToolsNotWritten
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import Data, DataFormat
from qlora_cli.units import format_count

PART_ROWS = 250
"""Maximum number of rows in a part. It takes a fraction of a second; Ctrl-C waits for its end."""
_PART_BYTES = 4 * 1024**2
"""Size of the rows of a part that is not exceeded by more than one row."""
_ROWS_PER_PROCESS = 10_000
"""Rows that are tokenized in about the time that starting a process takes."""
_MANY_BYTES = 16 * 1024**2
"""Size of data files whose rows are probably so many that several processes tokenize them."""
_NAMED = 3
"""Rows that an error about tools names."""

Group = tuple[DataFormat, Rows]
"""Consecutive rows of one format."""


class Encode(Protocol):
    """A function that turns rows into examples: `encode`, or the `encode` of a task."""

    def __call__(
        self,
        rows: Sequence[Row],
        format: DataFormat,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        only_check: bool = False,
    ) -> list[Result]:
        """Return one result per row, in order. Arguments and errors as of `encode`."""
        ...


@dataclass(frozen=True)
class Job:
    """A part of the rows to encode. The lists and arrays have one item per row."""

    format: DataFormat
    only_check: bool
    origins: list[str]
    pickled: list[bytes]
    files: NDArray[np.int32]
    lines: NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    batch: None if there are errors or rows were only checked. errors: of faulty rows, by origin.
    faults: of rows that can be used.
    """

    num_rows: int
    batch: pa.RecordBatch | None
    errors: list[tuple[str, RowError]] = field(default_factory=list)
    faults: RowFaults = field(default_factory=RowFaults)


@dataclass(frozen=True)
class Encoder:
    """The function that encodes a job. It can be sent to other processes.

    system: system prompt of rows that have none. Other fields as the arguments of `encode`.
    """

    encode: Encode
    tokenizer: Any
    vocab_size: int | None
    system: str | None

    @property
    def modules(self) -> list[str]:
        """Return the names of the modules that a process needs to encode."""
        return [__name__, self.encode.__module__, type(self.tokenizer).__module__]

    def __call__(self, job: Job) -> Outcome:
        """Return the job's outcome."""
        rows = unpickled(job.origins, job.pickled)
        if self.system:
            rows = add_system(rows, job.format, self.tokenizer, self.system)
        results = self.encode(
            rows,
            job.format,
            self.tokenizer,
            vocab_size=self.vocab_size,
            only_check=job.only_check,
        )
        errors = [
            (origin, result)
            for origin, result in zip(job.origins, results, strict=True)
            if isinstance(result, RowError)
        ]
        examples = [result for result in results if isinstance(result, Example)]
        if errors or len(examples) < len(rows):
            return Outcome(len(rows), None, errors)
        faults, words = RowChecker(self.tokenizer).check(rows, job.format, examples)
        batch = record_batch(examples, job.files, job.lines, words)
        return Outcome(len(rows), batch, faults=faults)


def num_processes(num_rows: int, data: Data) -> int:
    """Return the number of processes that tokenize."""
    if data.processes is not None:
        return data.processes
    return max(1, min(num_cores(), num_rows // _ROWS_PER_PROCESS))


def may_use_processes(num_bytes: int, data: Data) -> bool:
    """Return whether several processes probably tokenize. num_bytes: size of the data files."""
    most = num_cores() if data.processes is None else data.processes
    return num_bytes >= _MANY_BYTES and most > 1


def record_batches(
    groups: Sequence[Group],
    apply: Callable[[Iterator[Job]], Iterator[Outcome]],
    advance: Callable[[int], None],
    faults: RowFaults,
    done: int = 0,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all groups as record batches, in order.

    apply: calls an `Encoder` for each job. advance: called with the number of rows done so far.
    faults: receives the faults of all rows. done: number of rows done before.
    Raises DataError listing every row of a group that cannot be used, and what `encode` raises.
    """
    for row_format, rows in groups:
        problems = _GroupProblems()
        for outcome in apply(_jobs(row_format, rows, problems)):
            problems.add(outcome.errors)
            done += outcome.num_rows
            advance(done)
            faults.add(outcome.faults)
            if outcome.batch is not None:
                yield outcome.batch
        problems.raise_if_any(len(rows), row_format)


def _jobs(row_format: DataFormat, rows: Rows, problems: _GroupProblems) -> Iterator[Job]:
    for part in rows.parts(PART_ROWS, _PART_BYTES):
        store, numbers = part.store, part.numbers
        yield Job(
            row_format,
            # Faulty fields are reported alone, so the tokens of later rows are not needed.
            problems.fields.number > 0,
            store.origins(numbers),
            store.pickled(numbers),
            part.files,
            store.lines[numbers],
        )


class _GroupProblems:
    """The faulty rows of one group by kind. Only one kind is reported."""

    def __init__(self) -> None:
        self.fields, self.tools, self.others = RowProblems(), RowProblems(), RowProblems()

    def add(self, errors: Sequence[tuple[str, RowError]]) -> None:
        for origin, error in errors:
            if isinstance(error, FieldsError):
                self.fields.add(origin, error)
            elif isinstance(error, ToolsNotWritten):
                self.tools.add(origin, error)
            else:
                self.others.add(origin, error)

    def raise_if_any(self, num_rows: int, row_format: DataFormat) -> None:
        self.fields.raise_if_any(num_rows, f"as {row_format} rows")
        if self.tools.number:
            number = f"{format_count(self.tools.number)} of {format_count(num_rows)}"
            raise DataError(
                f"the chat template does not write tool calls, which {number} rows contain; the "
                "first:",
                self.tools.first[:_NAMED],
                hint="use a base whose chat template supports tools, name one with data.template, "
                "or remove the tools and their messages from the rows",
            )
        self.others.raise_if_any(num_rows)


def groups_of(rows: Rows, data: Data) -> list[Group]:
    """Return consecutive rows of one format together. Each file has one format.

    Raises DataError if the rows of a file are in no known format.
    """
    if not len(rows):
        return []
    numbers, first, inverse = np.unique(rows.files, return_index=True, return_inverse=True)
    by_file = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    formats: list[DataFormat] = ["text"] * len(numbers)
    for file in np.argsort(first):
        formats[file] = detect_format(rows.take(by_file[file]), data.format)
    codes = np.array([formats.index(name) for name in formats])[inverse]
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(rows)]
    return [(formats[codes[start]], rows[start:stop]) for start, stop in pairwise(bounds)]
