"""Findings about rows that can be trained on but may not be what the user intends.

Each check in `CHECKS` yields one sentence per finding. A finding is never an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encoded import Examples
from qlora_cli.data.formats import FORMATS, RowFormat
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.units import format_count

_NEARLY_FULL = 0.95
"""Share of seq_len above which a row nearly fills it."""
_LONG = 10
"""Multiple of the median length above which a row is reported as long."""
_TOO_LARGE = 0.9
"""Share of seq_len that the longest row should reach if rows are not packed."""
_NAMED = 3
"""Maximum number of rows that a finding names."""


@dataclass(frozen=True)
class TokenFacts:
    """What the checks need of the tokens of each row, in arrays of one item per row.

    digest: hash of the token ids; rows with equal digests are taken as equal (of two million
    different rows, two have the same one with a probability of 1e-7). begin: the first two tokens.
    last_target: the last trained token. unknown: number of tokens that the tokenizer does not know.
    equal_segments: whether the row has several segments and all have the same tokens.
    """

    digest: NDArray[np.uint64]
    begin: NDArray[np.int32]
    last_target: NDArray[np.int32]
    unknown: NDArray[np.int32]
    equal_segments: NDArray[np.bool_]

    @classmethod
    def of(cls, examples: Examples, unknown_id: int | None) -> TokenFacts:
        """Return the facts about examples. Their tokens are read once, one row at a time."""
        number = len(examples)
        digest, unknown = np.zeros(number, np.uint64), np.zeros(number, np.int32)
        equal = np.zeros(number, np.bool_)
        begin, last_target = np.full((number, 2), -1, np.int32), np.zeros(number, np.int32)
        for index in range(number):
            ids, labels = examples.arrays(index)
            digest[index] = int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest())
            begin[index, : len(ids)] = ids[:2]
            last_target[index] = labels[labels != IGNORE_INDEX][-1]
            unknown[index] = np.count_nonzero(ids == unknown_id) if unknown_id is not None else 0
            lengths = examples.segments(index)
            parts = np.split(ids, np.cumsum(lengths)[:-1]) if lengths else []
            equal[index] = bool(parts) and all(np.array_equal(parts[0], p) for p in parts[1:])
        return cls(digest, begin, last_target, unknown, equal)


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded rows and how they are arranged.

    held_out: rows of the evaluation set; None if there is none. tokenizer: the base's; None if it
    has none. num_sequences: number of sequences in an epoch.
    """

    examples: Examples
    held_out: Examples | None
    format: DataFormat
    tokenizer: Any
    seq_len: int
    packing: bool
    num_sequences: int

    @cached_property
    def facts(self) -> TokenFacts:
        """Return the facts about the tokens of `examples`."""
        return TokenFacts.of(self.examples, getattr(self.tokenizer, "unk_token_id", None))

    @property
    def row_format(self) -> RowFormat:
        """Return the format's entry in the registry."""
        return FORMATS[self.format]


def examine(dataset: EncodedDataset) -> tuple[str, ...]:
    """Return the findings of all checks, one sentence each."""
    return tuple(finding for check in CHECKS for finding in check(dataset))


def _double_bos(dataset: EncodedDataset) -> Iterator[str]:
    bos = getattr(dataset.tokenizer, "bos_token_id", None)
    if bos is None:
        return
    twice = np.flatnonzero((dataset.facts.begin == bos).all(axis=1))
    if len(twice):
        yield (
            f"{_rows(dataset.examples, twice)} begin with {dataset.tokenizer.bos_token} twice: the "
            "texts contain one and the chat template adds another"
        )


def _no_end(dataset: EncodedDataset) -> Iterator[str]:
    tokenizer, row_format = dataset.tokenizer, dataset.row_format
    if tokenizer is None:
        return
    adds_end = row_format.tokenized and not row_format.uses_chat_template(tokenizer)
    if tokenizer.eos_token_id is None and adds_end:
        yield "the tokenizer has no end token, so the model does not learn where to stop"
        return
    ends = {*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id} - {None}
    # A piece of a split row ends in the middle, except the last one.
    is_complete = dataset.examples.piece == dataset.examples.pieces
    is_open = ~np.isin(dataset.facts.last_target, list(ends))
    open_ended = np.flatnonzero(is_complete & is_open)
    if len(open_ended):
        yield (
            f"in {_rows(dataset.examples, open_ended)} the last trained token is not a special "
            "token: the chat template ends its turns with plain text or not at all, so the model "
            "may not stop"
        )


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
    number = int(dataset.facts.unknown.sum(dtype=np.int64))
    if number:
        yield f"{format_count(number)} tokens are unknown to the tokenizer ({tokenizer.unk_token})"


def _duplicates(dataset: EncodedDataset) -> Iterator[str]:
    examples = dataset.examples
    _, first, inverse = np.unique(dataset.facts.digest, return_index=True, return_inverse=True)
    earlier = first[inverse]
    # A row that its weight repeats has the same origin.
    places = np.stack([*examples.where(), examples.piece])
    is_other = (places != places[:, earlier]).any(axis=0)
    repeated = np.flatnonzero(is_other)
    if len(repeated):
        names = [
            f"{examples.origin(row)} is equal to {examples.origin(int(earlier[row]))}"
            for row in repeated[: _NAMED + 1]
        ]
        yield (
            f"{_count(len(repeated), 'row')} with the same tokens as an earlier row "
            f"({_first_names(names)})"
        )


def _held_out_in_train(dataset: EncodedDataset) -> Iterator[str]:
    if dataset.held_out is None:
        return
    held_out = TokenFacts.of(dataset.held_out, None)
    shared = np.flatnonzero(np.isin(held_out.digest, dataset.facts.digest))
    if len(shared):
        yield (
            f"{_rows(dataset.held_out, shared)} of data.eval are also in data.train, so the eval "
            "loss is too optimistic"
        )


def _equal_answers(dataset: EncodedDataset) -> Iterator[str]:
    equal = np.flatnonzero(dataset.facts.equal_segments)
    if len(equal):
        yield (
            f"{_rows(dataset.examples, equal)} have the same text as both answers, from which no "
            "preference is learned"
        )


def _lengths(dataset: EncodedDataset) -> Iterator[str]:
    examples, lengths = dataset.examples, dataset.examples.lengths
    longest, median = int(lengths.max()), float(np.median(lengths))
    long = np.flatnonzero(lengths > _LONG * median)
    if len(long):
        yield (
            f"{_rows(examples, long)} are more than {_LONG} times as long as the median "
            f"({median:g} tokens)"
        )
    is_whole = examples.pieces == 0
    nearly_full = np.flatnonzero(is_whole & (lengths > _NEARLY_FULL * dataset.seq_len))
    if len(nearly_full):
        yield f"{_rows(examples, nearly_full)} nearly fill data.seq_len={dataset.seq_len}"
    if not dataset.packing and longest < _TOO_LARGE * dataset.seq_len:
        yield (
            f"the longest row has {format_count(longest)} tokens: without packing, "
            f"data.seq_len={longest} is enough, and the plan needs less memory"
        )


def _few_targets(dataset: EncodedDataset) -> Iterator[str]:
    empty = np.flatnonzero(dataset.examples.targets == 1)
    if len(empty) and dataset.row_format.tokenized:
        yield (
            f"{_rows(dataset.examples, empty)} train one token only: the answer is empty except "
            "for its end token"
        )


def _packing_efficiency(dataset: EncodedDataset) -> Iterator[str]:
    if dataset.packing:
        tokens = int(dataset.examples.lengths.sum(dtype=np.int64))
        share = tokens / (dataset.num_sequences * dataset.seq_len)
        sequences = _count(dataset.num_sequences, "sequence")
        yield f"packing fills {sequences} of {dataset.seq_len} tokens to {share:.1%}"


def _rows(examples: Examples, places: NDArray[np.int64]) -> str:
    names = [examples.origin(int(place)) for place in places[: _NAMED + 1]]
    return f"{_count(len(places), 'row')} ({_first_names(names)})"


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
    _equal_answers,
    _lengths,
    _packing_efficiency,
)
"""All checks, in the order in which their findings are reported."""
