"""Rows of every format as token ids and labels.

A row becomes one text and the stretches of it that are trained. The text is tokenized whole, so
that pieces at a boundary come out as they will when the model reads them; a token is trained if
any of its characters is, so a token that straddles the boundary belongs to the completion: the
model can learn those characters in no other way.

Special tokens stand once. A chat template writes its own, so nothing is added to a chat; other
rows get what the tokenizer itself puts at the beginning, and one end token, which is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.align import Span
from qlora_cli.data.chat_template import ChatTemplate
from qlora_cli.data.formats import Row, rows_error
from qlora_cli.data.messages import RowFault, check_fields, conversation
from qlora_cli.errors import DataError, ModelError, Problem
from qlora_cli.nn.loss import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.units import format_count

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Taori et al. 2023, `PROMPT_DICT` of stanford_alpaca's train.py, to the letter."""

_CHUNK = 1000
"""Rows tokenized in one call; offsets of more would take gigabytes."""


@dataclass(frozen=True)
class Example:
    """A row as the model reads it. ids, labels: of the same length and not shifted.

    labels: the token's own id where it is trained, else UNTRAINED.
    """

    ids: list[int]
    labels: list[int]
    origin: str

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted and trained; the first one is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class _Piece:
    """A row's text. begin, end: the tokenizer's first tokens and the eos are still to be added."""

    text: str
    spans: tuple[Span, ...]
    begin: bool
    end: bool


def encode(
    rows: list[Row],
    format: DataFormat,
    tokenizer: Any,
    seq_len: int,
    *,
    vocab_size: int | None = None,
) -> list[Example]:
    """Each row as one Example, in order.

    tokenizer: a fast tokenizer; None where rows are ids. vocab_size: what ids must be below.
    Raises DataError naming every row that is malformed, longer than seq_len or without a trained
    token; ModelError where the tokenizer cannot serve.
    """
    if format == "tokens":
        found = _from_ids(rows, vocab_size or (tokenizer and len(tokenizer)))
    else:
        _check_tokenizer(tokenizer, format)
        found = _from_texts(rows, format, tokenizer)
    examples: list[Example] = []
    problems: list[Problem] = []
    longest = 0
    for row, example in zip(rows, found, strict=True):
        try:
            if isinstance(example, RowFault):
                raise example
            longest = max(longest, len(example.ids))
            examples.append(_checked(example, seq_len))
        except RowFault as fault:
            problems.append(Problem(row.origin, str(fault), fault.hint))
    if problems:
        error = rows_error(problems, len(rows))
        hint = f"data.seq_len={longest} would hold the longest row" if longest > seq_len else None
        raise DataError(error.what, error.problems, hint=hint)
    return examples


def _checked(example: Example, seq_len: int) -> Example:
    length = len(example.ids)
    if length > seq_len:
        raise RowFault(f"{format_count(length)} tokens, and seq_len is {format_count(seq_len)}")
    if not example.num_targets:
        raise RowFault("no token of it would be trained")
    return example


def _check_tokenizer(tokenizer: Any, format: DataFormat) -> None:
    if tokenizer is None:
        raise ModelError(
            "the base has no tokenizer", hint="only rows of input_ids (format: tokens) can be used"
        )
    if not tokenizer.is_fast:
        raise ModelError(
            "the base's tokenizer is a slow one, which does not say where its tokens stand",
            hint="it needs a tokenizer.json; transformers makes one with save_pretrained",
        )
    if format in ("messages", "sharegpt") and not tokenizer.chat_template:
        raise ModelError(
            f"{format} rows need a chat template, and the base's tokenizer has none",
            hint="use the instruct variant of the base, put the template that you want into its "
            "tokenizer's folder as chat_template.jinja, or write prompt and completion rows",
        )


def _from_ids(rows: list[Row], vocab_size: int | None) -> Iterator[Example | RowFault]:
    for row in rows:
        try:
            check_fields(row.fields, "tokens")
            ids, labels = row.fields["input_ids"], row.fields.get("labels")
            labels = list(ids if labels is None else labels)
            for name, values, lowest in (("input_ids", ids, 0), ("labels", labels, IGNORE_INDEX)):
                _check_range(name, values, lowest, vocab_size)
            yield Example(list(ids), labels, row.origin)
        except RowFault as fault:
            yield fault


def _check_range(name: str, values: list[int], lowest: int, vocab_size: int | None) -> None:
    for value in values:
        if lowest < value < 0 or value < lowest:
            raise RowFault(f"{value} in {name!r} is no token's id")
        if vocab_size is not None and value >= vocab_size:
            raise RowFault(f"{value} in {name!r}, and the vocabulary ends at {vocab_size - 1}")


def _from_texts(
    rows: list[Row], format: DataFormat, tokenizer: Any
) -> Iterator[Example | RowFault]:
    template = ChatTemplate(tokenizer)
    for first in range(0, len(rows), _CHUNK):
        chunk = rows[first : first + _CHUNK]
        pieces = [_piece(row, format, template) for row in chunk]
        found = _tokenized(chunk, pieces, tokenizer)
        for place, piece in enumerate(pieces):
            yield piece if isinstance(piece, RowFault) else found[place]


def _piece(row: Row, format: DataFormat, template: ChatTemplate) -> _Piece | RowFault:
    try:
        check_fields(row.fields, format)
        if format in ("messages", "sharegpt") or (
            format == "alpaca" and template.tokenizer.chat_template
        ):
            written = template.write(conversation(row.fields, format))
            return _Piece(written.text, written.spans, begin=False, end=False)
        prompt, completion = _plain(row.fields, format)
    except RowFault as fault:
        return fault
    text, bos = prompt + completion, template.tokenizer.bos_token
    # A prompt copied out of a rendered chat has its bos already.
    begun = bool(bos) and text.startswith(bos)
    return _Piece(text, ((len(prompt), len(text)),), begin=not begun, end=True)


def _plain(fields: dict[str, Any], format: DataFormat) -> tuple[str, str]:
    """What is read and what is learnt, as the row's own words."""
    if format == "text":
        return "", fields["text"]
    if format == "completion":
        return fields["prompt"], fields["completion"]
    if fields.get("system"):
        raise RowFault("'system' needs a chat template, and the base's tokenizer has none")
    layout = ALPACA_WITH_INPUT if fields.get("input") else ALPACA
    return layout.format_map(fields), fields["output"]


def _tokenized(
    rows: list[Row], pieces: list[_Piece | RowFault], tokenizer: Any
) -> dict[int, Example]:
    """The examples of the sound pieces, by place."""
    found: dict[int, Example] = {}
    for begin in (True, False):
        chosen = [
            (place, piece)
            for place, piece in enumerate(pieces)
            if isinstance(piece, _Piece) and piece.begin == begin
        ]
        if not chosen:
            continue
        # verbose: rows are held against seq_len here, not against the tokenizer's own maximum.
        tokens = tokenizer(
            [piece.text for _, piece in chosen],
            add_special_tokens=begin,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for i, (place, piece) in enumerate(chosen):
            ids, offsets = tokens["input_ids"][i], tokens["offset_mapping"][i]
            labels = _labels(ids, offsets, piece.spans)
            if piece.end:
                _end(ids, labels, tokenizer.eos_token_id)
            found[place] = Example(ids, labels, rows[place].origin)
    return found


def _labels(ids: list[int], offsets: list[Span], spans: tuple[Span, ...]) -> list[int]:
    """The ids of the tokens with a character in one of the spans, which are in order."""
    labels = [IGNORE_INDEX] * len(ids)
    place = 0
    for start, stop in spans:
        while place < len(ids) and offsets[place][1] <= start:
            place += 1
        for i in range(place, len(ids)):
            begins, ends = offsets[i]
            # A tokenizer that trims white space out of its offsets leaves none of a white token:
            # it stands before `ends`.
            if min(begins, ends - 1) >= stop:
                break
            if ends > start:
                labels[i] = ids[i]
    return labels


def _end(ids: list[int], labels: list[int], eos: int | None) -> None:
    """One trained eos at the end; the row or the tokenizer may have put it there already."""
    if eos is None:
        return
    if not ids or ids[-1] != eos:
        ids.append(eos)
        labels.append(eos)
    labels[-1] = eos
