"""Findings about rows that can be trained on but may not be what the user intends.

Each check in `CHECKS` yields one sentence per finding. A finding is never an error.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.encode import Example
from qlora_cli.data.formats import FORMATS, RowFormat
from qlora_cli.nn.loss import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.units import format_count

_PIECE = re.compile(r" \[(\d+)/(\d+)\]$")
"""End of the origin of a piece of a split row: its number and the number of pieces."""
_NEARLY_FULL = 0.95
"""Share of seq_len above which a row nearly fills it."""
_LONG = 10
"""Multiple of the median length above which a row is reported as long."""
_TOO_LARGE = 0.9
"""Share of seq_len that the longest row should reach if rows are not packed."""
_NAMED = 3
"""Maximum number of rows that a finding names."""


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded rows and how they are arranged.

    held_out: rows of the evaluation set; empty if there is none. tokenizer: the base's; None if it
    has none. num_sequences: number of sequences in an epoch.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]
    format: DataFormat
    tokenizer: Any
    seq_len: int
    packing: bool
    num_sequences: int

    @property
    def row_format(self) -> RowFormat:
        """Return the format's entry in the registry."""
        return FORMATS[self.format]


def examine(dataset: EncodedDataset) -> tuple[str, ...]:
    """Return the findings of all checks, one sentence each."""
    return tuple(finding for check in CHECKS for finding in check(dataset))


def _double_bos(dataset: EncodedDataset) -> Iterator[str]:
    bos = getattr(dataset.tokenizer, "bos_token_id", None)
    twice = [row for row in dataset.examples if bos is not None and row.ids[:2] == [bos, bos]]
    if twice:
        yield (
            f"{_rows(twice)} begin with {dataset.tokenizer.bos_token} twice: the texts contain one "
            "and the chat template adds another"
        )


def _no_end(dataset: EncodedDataset) -> Iterator[str]:
    tokenizer, row_format = dataset.tokenizer, dataset.row_format
    if tokenizer is None:
        return
    adds_end = row_format.tokenized and not row_format.uses_chat_template(tokenizer)
    if tokenizer.eos_token_id is None and adds_end:
        yield "the tokenizer has no end token, so the model does not learn where to stop"
        return
    ends = {*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id}
    complete = (row for row in dataset.examples if not _has_later_piece(row))
    open_ended = [row for row in complete if _last_target(row) not in ends]
    if open_ended:
        yield (
            f"in {_rows(open_ended)} the last trained token is not a special token: the chat "
            "template ends its turns with plain text or not at all, so the model may not stop"
        )


def _has_later_piece(row: Example) -> bool:
    """Return whether the example is a piece of a split row, but not the last one."""
    match = _PIECE.search(row.origin)
    return match is not None and match[1] != match[2]


def _last_target(row: Example) -> int:
    return next(label for label in reversed(row.labels) if label != IGNORE_INDEX)


def _outside_template(dataset: EncodedDataset) -> Iterator[str]:
    if getattr(dataset.tokenizer, "chat_template", None) and dataset.format == "completion":
        yield (
            "the tokenizer has a chat template, but the rows are plain prompts and completions: "
            "the model learns these answers outside a chat; write messages rows to train chats"
        )


def _dated(dataset: EncodedDataset) -> Iterator[str]:
    template = getattr(dataset.tokenizer, "chat_template", None)
    if dataset.row_format.uses_chat_template(dataset.tokenizer) and "strftime_now" in str(template):
        yield (
            "the chat template writes today's date into every row, so the rows differ on another "
            "day"
        )


def _unknown_tokens(dataset: EncodedDataset) -> Iterator[str]:
    tokenizer = dataset.tokenizer
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    number = sum(row.ids.count(unknown) for row in dataset.examples)
    if number:
        yield f"{format_count(number)} tokens are unknown to the tokenizer ({tokenizer.unk_token})"


def _duplicates(dataset: EncodedDataset) -> Iterator[str]:
    first: dict[tuple[int, ...], str] = {}
    repeated = [
        f"{row.origin} is equal to {earlier}"
        for row in dataset.examples
        if (earlier := first.setdefault(tuple(row.ids), row.origin)) != row.origin
    ]
    if repeated:
        count = _count(len(repeated), "row")
        yield f"{count} with the same tokens as an earlier row ({_first_names(repeated)})"


def _held_out_in_train(dataset: EncodedDataset) -> Iterator[str]:
    train = {tuple(row.ids) for row in dataset.examples}
    shared = [row for row in dataset.held_out if tuple(row.ids) in train]
    if shared:
        yield (
            f"{_rows(shared)} of data.eval are also in data.train, so the eval loss is too "
            "optimistic"
        )


def _lengths(dataset: EncodedDataset) -> Iterator[str]:
    lengths = [len(row.ids) for row in dataset.examples]
    median = statistics.median(lengths)
    long = [row for row in dataset.examples if len(row.ids) > _LONG * median]
    if long:
        yield f"{_rows(long)} are more than {_LONG} times as long as the median ({median:g} tokens)"
    rows = [row for row in dataset.examples if not _PIECE.search(row.origin)]
    nearly_full = [row for row in rows if len(row.ids) > _NEARLY_FULL * dataset.seq_len]
    if nearly_full:
        yield f"{_rows(nearly_full)} nearly fill data.seq_len={dataset.seq_len}"
    if not dataset.packing and max(lengths) < _TOO_LARGE * dataset.seq_len:
        yield (
            f"the longest row has {format_count(max(lengths))} tokens: without packing, "
            f"data.seq_len={max(lengths)} is enough, and the plan needs less memory"
        )


def _few_targets(dataset: EncodedDataset) -> Iterator[str]:
    empty = [row for row in dataset.examples if row.num_targets == 1]
    if empty and dataset.row_format.tokenized:
        yield f"{_rows(empty)} train one token only: the answer is empty except for its end token"


def _packing_efficiency(dataset: EncodedDataset) -> Iterator[str]:
    if dataset.packing:
        tokens = sum(len(row.ids) for row in dataset.examples)
        share = tokens / (dataset.num_sequences * dataset.seq_len)
        sequences = _count(dataset.num_sequences, "sequence")
        yield f"packing fills {sequences} of {dataset.seq_len} tokens to {share:.1%}"


def _rows(rows: Sequence[Example]) -> str:
    return f"{_count(len(rows), 'row')} ({_first_names([row.origin for row in rows])})"


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _count(number: int, noun: str) -> str:
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"


CHECKS: tuple[Callable[[EncodedDataset], Iterator[str]], ...] = (
    _double_bos,
    _no_end,
    _outside_template,
    _dated,
    _unknown_tokens,
    _duplicates,
    _held_out_in_train,
    _few_targets,
    _lengths,
    _packing_efficiency,
)
"""All checks, in the order in which their findings are reported."""
