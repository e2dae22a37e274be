"""The one path from a data file to examples: read rows, detect their format, encode, check.

Training, `qlora data`, evaluation and verification all call `load_examples`, so they accept and
refuse the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qlora_cli.data.encode import Example, encode
from qlora_cli.data.formats import detect_format
from qlora_cli.data.row_errors import SHOWN_PROBLEMS
from qlora_cli.data.rows import Row, read_rows
from qlora_cli.errors import DataError, Problem
from qlora_cli.recipe.schema import Data, DataFormat
from qlora_cli.units import format_count


class Encode(Protocol):
    """A function that turns rows into examples: `encode`, or the `encode` of a task."""

    def __call__(
        self,
        rows: list[Row],
        format: DataFormat,
        tokenizer: Any,
        seq_len: int,
        *,
        vocab_size: int | None = None,
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
    """The examples of one data file and the format that its rows are in."""

    format: DataFormat
    examples: list[Example]


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

    where: as in `read_rows`. data: the recipe's section; its `format` and `seq_len` are used.
    tokenizer: the base's; None if it has none. limits: of the model that reads the rows.
    encode: the task's function. select: the part of the rows to encode.
    Raises InputError if the file cannot be read, DataError listing every row that cannot be used,
    ModelError if the tokenizer cannot encode the format.
    """
    rows = read_rows(where)[select]
    row_format = detect_format(rows, data.format)
    examples = encode(rows, row_format, tokenizer, data.seq_len, vocab_size=limits.vocab_size)
    _check_positions(examples, limits.positions)
    return LoadedRows(row_format, examples)


def _check_positions(examples: Sequence[Example], positions: int | None) -> None:
    """Raise DataError if an example is longer than the model has positions."""
    if positions is None:
        return
    too_long = [example for example in examples if len(example.ids) > positions]
    if too_long:
        raise DataError(
            f"{format_count(len(too_long))} rows are longer than the base's "
            f"{format_count(positions)} positions",
            [
                Problem(example.origin, f"{format_count(len(example.ids))} tokens")
                for example in too_long[:SHOWN_PROBLEMS]
            ],
            hint=f"shorten them to {positions} tokens or use a base with more positions",
        )
