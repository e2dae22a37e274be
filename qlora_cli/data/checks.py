"""What is odd about rows that can be trained on: one sentence each, never an error."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.encode import Example
from qlora_cli.nn.loss import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.units import format_count

_NEAR = 0.95
_LONG = 10
_LOOSE = 0.9
_NAMED = 3


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded rows and how they will be laid out. num_sequences: of one epoch."""

    examples: Sequence[Example]
    held_out: Sequence[Example]
    format: DataFormat
    tokenizer: Any
    seq_len: int
    packing: bool
    num_sequences: int


def examine(patient: EncodedDataset) -> tuple[str, ...]:
    """Everything worth knowing before training on these rows."""
    return tuple(finding for look in _LOOKS for finding in look(patient))


def _double_bos(patient: EncodedDataset) -> Iterator[str]:
    bos = getattr(patient.tokenizer, "bos_token_id", None)
    twice = [row for row in patient.examples if bos is not None and row.ids[:2] == [bos, bos]]
    if twice:
        yield (
            f"{_rows(twice)} begin with {patient.tokenizer.bos_token} twice; the texts hold one, "
            "the chat template another"
        )


def _no_end(patient: EncodedDataset) -> Iterator[str]:
    tokenizer = patient.tokenizer
    if tokenizer is None:
        return
    if tokenizer.eos_token_id is None and patient.format in ("text", "completion"):
        yield "the tokenizer has no end token, so the model does not learn where to stop"
        return
    ends = {*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id}
    open_ended = [row for row in patient.examples if _last_target(row) not in ends]
    if open_ended:
        yield (
            f"in {_rows(open_ended)} the last trained token is no special token: the chat "
            "template ends its turns with plain text or not at all, so the model may not stop"
        )


def _last_target(row: Example) -> int:
    return next(label for label in reversed(row.labels) if label != IGNORE_INDEX)


def _outside_template(patient: EncodedDataset) -> Iterator[str]:
    if getattr(patient.tokenizer, "chat_template", None) and patient.format == "completion":
        yield (
            "the tokenizer has a chat template and the rows are plain prompts and completions: "
            "the model will answer so outside a chat; write messages rows to train it inside one"
        )


def _dated(patient: EncodedDataset) -> Iterator[str]:
    chat = patient.format in ("messages", "sharegpt", "alpaca")
    template = getattr(patient.tokenizer, "chat_template", None)
    if chat and template and "strftime_now" in str(template):
        yield "the chat template writes today's date into every row; another day gives other rows"


def _unknown_tokens(patient: EncodedDataset) -> Iterator[str]:
    tokenizer = patient.tokenizer
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    number = sum(row.ids.count(unknown) for row in patient.examples)
    if number:
        yield f"{format_count(number)} tokens are unknown to the tokenizer ({tokenizer.unk_token})"


def _duplicates(patient: EncodedDataset) -> Iterator[str]:
    first: dict[tuple[int, ...], str] = {}
    again = [
        f"{row.origin} is {before}"
        for row in patient.examples
        if (before := first.setdefault(tuple(row.ids), row.origin)) != row.origin
    ]
    if again:
        yield f"{_count(len(again), 'row')} of the same tokens as an earlier one ({_some(again)})"


def _held_out_in_train(patient: EncodedDataset) -> Iterator[str]:
    train = {tuple(row.ids) for row in patient.examples}
    both = [row for row in patient.held_out if tuple(row.ids) in train]
    if both:
        yield f"{_rows(both)} of data.eval stand in data.train too: the eval loss flatters"


def _lengths(patient: EncodedDataset) -> Iterator[str]:
    lengths = [len(row.ids) for row in patient.examples]
    median = statistics.median(lengths)
    long = [row for row in patient.examples if len(row.ids) > _LONG * median]
    if long:
        yield f"{_rows(long)} are more than {_LONG} times as long as the median ({median:g} tokens)"
    near = [row for row in patient.examples if len(row.ids) > _NEAR * patient.seq_len]
    if near:
        yield f"{_rows(near)} nearly fill data.seq_len={patient.seq_len}"
    if not patient.packing and max(lengths) < _LOOSE * patient.seq_len:
        yield (
            f"the longest row has {format_count(max(lengths))} tokens: without packing, "
            f"data.seq_len={max(lengths)} is enough and plans for less memory"
        )


def _few_targets(patient: EncodedDataset) -> Iterator[str]:
    empty = [row for row in patient.examples if row.num_targets == 1]
    if empty and patient.format != "tokens":
        yield f"{_rows(empty)} train one token only: the answer is empty but for its end"


def _efficiency(patient: EncodedDataset) -> Iterator[str]:
    if patient.packing:
        tokens = sum(len(row.ids) for row in patient.examples)
        share = tokens / (patient.num_sequences * patient.seq_len)
        sequences = _count(patient.num_sequences, "sequence")
        yield f"packing fills {sequences} of {patient.seq_len} tokens to {share:.1%}"


def _rows(rows: Sequence[Example]) -> str:
    return f"{_count(len(rows), 'row')} ({_some([row.origin for row in rows])})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _count(number: int, what: str) -> str:
    return f"{format_count(number)} {what}{'' if number == 1 else 's'}"


_LOOKS: tuple[Callable[[EncodedDataset], Iterator[str]], ...] = (
    _double_bos,
    _no_end,
    _outside_template,
    _dated,
    _unknown_tokens,
    _duplicates,
    _held_out_in_train,
    _few_targets,
    _lengths,
    _efficiency,
)
