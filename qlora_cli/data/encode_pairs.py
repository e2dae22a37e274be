"""Encode preference rows: each becomes one example with two segments, chosen and rejected.

Each answer is encoded with its prompt as `encode` does it with a chat, or with the row of a prompt
and a completion. The prompt is therefore in the example twice; attention does not cross from one
segment to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_cli.data.chat_template import ChatTemplate
from qlora_cli.data.contents import AnswerPair
from qlora_cli.data.conversation import PAIR, Conversation
from qlora_cli.data.encode import Example, Result, check_tokenizer, checked, rendered, tokenized
from qlora_cli.data.formats import content_of
from qlora_cli.data.row_errors import FieldsError, RowError
from qlora_cli.data.row_store import Row
from qlora_cli.errors import InputError
from qlora_cli.recipe.schema import DataFormat


def encode_pairs(
    rows: Sequence[Row],
    format: DataFormat,
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    only_check: bool = False,
) -> list[Result]:
    """Return an Example with two segments for each preference row, or the error of the row.

    Arguments as of `encode`. Raises ModelError if the tokenizer cannot encode the rows, InputError
    if they are of another format.
    """
    if format != "preference":
        raise InputError(
            f"the rows are {format} rows, and task: preference needs pairs",
            hint="give each row a chosen and a rejected answer, or set task: causal",
        )
    parsed = [content_of(row, format) for row in rows]
    pairs = [content for content in parsed if isinstance(content, AnswerPair)]
    if only_check or len(pairs) < len(rows):
        return [content if isinstance(content, FieldsError) else None for content in parsed]
    needs_template = any(isinstance(pair.chosen, Conversation) for pair in pairs)
    check_tokenizer(tokenizer, format, needs_template=needs_template)
    template = ChatTemplate(tokenizer)
    answers = []
    for side in PAIR:
        texts = [rendered(getattr(pair, side), template) for pair in pairs]
        answers.append(tokenized([row.origin for row in rows], texts, tokenizer))
    return [checked(_joined(*pair), vocab_size) for pair in zip(*answers, strict=True)]


def _joined(chosen: Example | RowError, rejected: Example | RowError) -> Example | RowError:
    """Return both answers as one example, or the error of one of them."""
    if isinstance(chosen, RowError):
        return chosen
    if isinstance(rejected, RowError):
        return rejected
    return Example(
        chosen.ids + rejected.ids,
        chosen.labels + rejected.labels,
        chosen.origin,
        (len(chosen.ids), len(rejected.ids)),
    )
