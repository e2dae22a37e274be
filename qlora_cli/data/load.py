"""The one path from data files to examples: choose rows, detect their format, encode, fit lengths.

Training, `qlora data`, evaluation and verification all call this module, so they accept and refuse
the same rows. Rows are read and tokenized in a stream. The tokens of many rows are not in Python
lists but in a file, of the cache or temporary, that is mapped into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_cli.data.encode import encode
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.examples import Examples
from qlora_cli.data.fast_tokens import install_hint
from qlora_cli.data.formats import FORMATS
from qlora_cli.data.long_rows import LongRowsReport, fit_rows, policy_of
from qlora_cli.data.mixture import (
    DataRows,
    SourceCount,
    choice_notes,
    read_data,
    read_held_out,
)
from qlora_cli.data.positions import num_positions
from qlora_cli.data.processes import prepare_workers, workers
from qlora_cli.data.row_store import Rows
from qlora_cli.data.rows import read_rows
from qlora_cli.data.stream import (
    Encode,
    Encoder,
    Group,
    groups_of,
    may_use_processes,
    num_processes,
    record_batches,
)
from qlora_cli.data.system_prompt import writes_system
from qlora_cli.data.text_checks import RowFaults
from qlora_cli.data.token_cache import (
    PART_FILES,
    CacheKey,
    EncodedData,
    EncodedPart,
    key_for,
    mapped,
    read_entry,
    write_batches,
    write_entry,
    write_errors,
)
from qlora_cli.errors import DataError, Problem
from qlora_cli.events import Observer, Silent
from qlora_cli.files.atomic import atomic_folder
from qlora_cli.files.cache import locked
from qlora_cli.recipe.schema import Data, DataFormat
from qlora_cli.units import format_count

_SILENT = Silent()
_MAPPED_ROWS = 10_000
"""Number of rows from which on their tokens are in a file."""
_MANY_ROWS = 50_000
"""Number of rows from which on a faster tokenizer saves more time than installing it takes."""


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
        return cls(config.vocab_size, num_positions(config))


@dataclass(frozen=True)
class LoadedRows:
    """Rows as examples that a model can read.

    format: of the rows; of most of them if the sources have different formats. long_rows: what was
    done with rows that were too long. A split row is several examples.
    """

    format: DataFormat
    examples: Examples
    long_rows: LongRowsReport


@dataclass(frozen=True)
class LoadedData:
    """The training rows and the held-out rows of a recipe.

    held_out: None if `data.eval` is null. sources: of the training rows. notes: one line for the
    user per choice or loss of rows. faults: of the texts of all rows.
    """

    train: LoadedRows
    held_out: LoadedRows | None
    sources: tuple[SourceCount, ...]
    notes: tuple[str, ...]
    faults: RowFaults


@dataclass(frozen=True)
class RowLoader:
    """Loads rows by the settings of a recipe, for one model.

    data: the recipe's section. tokenizer: the base's; None if it has none. limits: of the model
    that reads the rows. encode: the task's function.
    All methods raise InputError if a file cannot be read, DataError listing every row that cannot
    be used, ModelError if the tokenizer cannot encode the format.
    """

    data: Data
    tokenizer: Any
    limits: ModelLimits
    encode: Encode = encode

    def load(self, observer: Observer = _SILENT) -> LoadedData:
        """Return all rows of the recipe.

        observer: receives the number of tokenized rows, as the stage `tokenize`; nothing is
        tokenized if the cache contains the tokens.
        """
        encoded = self._from_cache(observer)
        train = self._fitted(encoded.train)
        held_out = None if encoded.held_out is None else self._fitted(encoded.held_out)
        num_held_out = 0 if encoded.held_out is None else len(encoded.held_out.rows)
        notes = choice_notes(self.data, encoded.sources, num_held_out)
        if self.data.system and not writes_system(self.tokenizer):
            notes.append(
                "the chat template does not write system prompts: data.system is put in front of "
                "the first user message"
            )
        notes += [text for text in [train.long_rows.text()] if text]
        if held_out is not None and (text := held_out.long_rows.text()):
            notes.append(f"held-out rows: {text}")
        faults = RowFaults()
        for part in (encoded.train, encoded.held_out):
            if part is not None:
                faults.add(part.faults)
        return LoadedData(train, held_out, encoded.sources, tuple(notes), faults)

    def train(self, select: slice = slice(None)) -> LoadedRows:
        """Return the training rows. select: the part of them."""
        return self._part(read_data(self.data).train[select])

    def held_out(self, select: slice = slice(None)) -> LoadedRows:
        """Return the held-out rows of a recipe whose `data.eval` is not null."""
        return self._part(read_held_out(self.data)[select])

    def file(self, where: str, select: slice = slice(None)) -> LoadedRows:
        """Return the rows of a file or dataset, in order. where: as in `read_rows`."""
        return self._part(read_rows(where, columns=self.data.columns)[select])

    def _part(self, rows: Rows) -> LoadedRows:
        return self._fitted(self._encoded(DataRows(rows, None, ()), _SILENT).train)

    def _from_cache(self, observer: Observer) -> EncodedData:
        """Return the tokens of the recipe's rows from the cache, which they are added to."""
        key = key_for(self.data, self.tokenizer, self.limits.vocab_size, self.encode)
        if key is None:
            return self._encoded(read_data(self.data, observer=observer), observer)
        if found := read_entry(key, self.data):
            return found
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(key.folder))
            except OSError as error:
                observer.note(
                    f"{key.folder.parent} cannot be written ({error.strerror}), so the tokens are "
                    "not kept for later runs; QLORA_CACHE names another folder"
                )
                return self._encoded(read_data(self.data, observer=observer), observer)
            # Another process may have written the entry while this one waited.
            return read_entry(key, self.data) or self._new_entry(key, observer)

    def _new_entry(self, key: CacheKey, observer: Observer) -> EncodedData:
        """Encode the recipe's rows into a new entry of the cache and return them."""
        if may_use_processes(key.num_bytes, self.data):
            prepare_workers(self._encoder.modules)
        rows = read_data(self.data, key.folder.parent, observer)
        with write_errors(key.folder), atomic_folder(key.folder) as partial:
            encoded, checksums = self._encode_into(partial, rows, observer)
            key.check_unchanged()
            write_entry(partial, key, encoded, checksums)
        return encoded

    def _encoded(self, rows: DataRows, observer: Observer) -> EncodedData:
        """Encode rows in memory, or if they are many, into files that nothing else uses."""
        if _num_rows(rows) < _MAPPED_ROWS:
            return self._encode_into(None, rows, observer)[0]
        # The files exist until their last mapping ends.
        with TemporaryDirectory(prefix="qlora-") as folder:
            return self._encode_into(Path(folder), rows, observer)[0]

    def _encode_into(
        self, folder: Path | None, rows: DataRows, observer: Observer
    ) -> tuple[EncodedData, list[int]]:
        """Encode rows into files in a folder. Return them, and the checksums of the files.

        folder: None keeps them in memory.
        """
        number = _num_rows(rows)
        observer.stage("tokenize", number)
        encoder = self._encoder
        parts: list[EncodedPart] = []
        checksums: list[int] = []
        done = 0
        chosen = [rows.train, *([rows.held_out] if rows.held_out is not None else [])]
        with workers(encoder, num_processes(number, self.data), encoder.modules) as apply:
            for part, name in zip(chosen, PART_FILES, strict=False):
                groups = groups_of(part, self.data)
                if hint := self._hint(groups):
                    observer.note(hint)
                faults = RowFaults()
                batches = record_batches(groups, apply, observer.advance, faults, done)
                names = part.store.names
                if folder is None:
                    encoded = EncodedRows(list(batches), names)
                else:
                    checksums.append(write_batches(folder / name, batches))
                    encoded = mapped(folder / name, names)
                formats = tuple((row_format, len(group)) for row_format, group in groups)
                parts.append(EncodedPart(encoded, formats, faults))
                done += len(part)
        return EncodedData(parts[0], parts[1] if parts[1:] else None, rows.sources), checksums

    @property
    def _encoder(self) -> Encoder:
        return Encoder(self.encode, self.tokenizer, self.limits.vocab_size, self.data.system)

    def _hint(self, groups: Sequence[Group]) -> str | None:
        """Return a line on how these rows are tokenized faster, if they are many."""
        many = sum(len(rows) for name, rows in groups if FORMATS[name].tokenized) >= _MANY_ROWS
        return install_hint(self.tokenizer) if many and self.tokenizer else None

    def _fitted(self, part: EncodedPart) -> LoadedRows:
        """Apply `data.long_rows` to the rows."""
        seq_len, positions = self.data.seq_len, self.limits.positions
        limit = seq_len if positions is None else min(seq_len, positions)
        report = LongRowsReport(limit, seq_len)
        whole = Examples.whole(part.rows)
        fitted: list[Examples] = []
        counts: Counter[DataFormat] = Counter()
        for row_format, number in part.formats:
            rows = whole[report.rows : report.rows + number]
            fitted.append(fit_rows(rows, policy_of(self.data.long_rows, row_format), report))
            counts[row_format] += number
        if not any(map(len, fitted)):
            raise _nothing_left(report)
        return LoadedRows(counts.most_common(1)[0][0], Examples.joined(fitted), report)


def _num_rows(rows: DataRows) -> int:
    return len(rows.train) + (0 if rows.held_out is None else len(rows.held_out))


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
