"""Find the tokens of a text whose characters are trained.

A token is trained if any of its characters is in a trained span. The first and the last token of a
span are looked up in the tokenizer's encoding. If a lookup does not decide (white space that is
outside of the offsets, a token that crosses the end of a span), the offsets of all tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_cli.data.align import Span
from qlora_cli.nn.labels import IGNORE_INDEX


def trained_labels(
    encoding: Any, ids: Sequence[int], spans: Sequence[Span], num_characters: int
) -> list[int]:
    """Return the id of each token that has a character in a span, else IGNORE_INDEX.

    encoding: of the text by the tokenizers library. ids: its token ids. spans: in ascending order.
    num_characters: length of the text.
    """
    labels = [IGNORE_INDEX] * len(ids)
    for span in spans:
        tokens = _tokens_of(encoding, span, num_characters)
        if tokens is None:
            return _labels_by_offsets(ids, encoding.offsets, spans)
        labels[tokens] = ids[tokens]
    return labels


def begins_inside_token(encoding: Any, labels: Sequence[int], start: int) -> bool:
    """Return whether the first trained token begins before the character `start`."""
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), None)
    return first is not None and encoding.token_to_chars(first)[0] < start


def _tokens_of(encoding: Any, span: Span, num_characters: int) -> slice | None:
    """Return the tokens of a span; None if only all offsets decide."""
    start, stop = span
    first = encoding.char_to_token(start)
    if first is None or stop <= start:
        return None
    if stop == num_characters:
        return None if _has_added_end(encoding) else slice(first, len(encoding))
    after = encoding.char_to_token(stop)
    if after is None or encoding.token_to_chars(after)[0] < stop:
        return None
    return slice(first, after)


def _has_added_end(encoding: Any) -> bool:
    """Return whether the last token is one that the tokenizer adds, which has no characters."""
    return not len(encoding) or encoding.token_to_chars(len(encoding) - 1) in (None, (0, 0))


def _labels_by_offsets(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]
) -> list[int]:
    """Return the same as `trained_labels` by the [start, stop) of each token in characters."""
    labels = [IGNORE_INDEX] * len(ids)
    first = 0
    for start, stop in spans:
        while first < len(ids) and offsets[first][1] <= start:
            first += 1
        for i in range(first, len(ids)):
            token_start, token_stop = offsets[i]
            # A tokenizer that removes white space from its offsets gives an empty range for a
            # token of white space; its character is the one before `token_stop`.
            if token_start >= stop and token_stop > stop:
                break
            if token_stop > start:
                labels[i] = ids[i]
    return labels
