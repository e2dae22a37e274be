"""Find texts inside a longer text that is built from known pieces and these texts, in turn."""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]
"""[start, stop) in characters."""


def common_prefix(first: str, second: str) -> str:
    """Return the longest text that both arguments begin with."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return first[:length]


def marker(number: int) -> str:
    """Return a text that does not occur elsewhere and that no template trims.

    number: index of the message that the marker replaces. It is between two private-use characters.
    """
    return f"\ue0a0{number}\ue0a1"


def split(text: str, markers: Sequence[str]) -> list[str] | None:
    """Return the pieces before, between and after the markers.

    Returns None unless each marker occurs exactly once and in this order.
    """
    pieces = []
    for item in markers:
        piece, separator, text = text.partition(item)
        if not separator or item in text:
            return None
        pieces.append(piece)
    return [*pieces, text]


def exact_spans(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """Return the span of each content if `text` is exactly pieces and contents in turn, else None.

    pieces: one more than contents.
    """
    spans: list[Span] = []
    stop = len(pieces[0])
    for content, next_piece in zip(contents, pieces[1:], strict=True):
        spans.append((stop, stop + len(content)))
        stop += len(content) + len(next_piece)
    parts = (part for pair in zip(pieces, [*contents, ""], strict=True) for part in pair)
    return spans if "".join(parts) == text else None


def align(text: str, pieces: list[str], contents: list[str]) -> list[Span] | None:
    """Return the span of each content if `text` is pieces and contents in turn, else None.

    pieces: one more than contents. The text may differ from this sequence in one way: a content
    may be trimmed or have other white space, as some templates write it.
    """
    if not text.startswith(pieces[0]):
        return None
    start = len(pieces[0])
    spans: list[Span] = []
    for content, next_piece in zip(contents, pieces[1:], strict=True):
        is_last = len(spans) + 1 == len(contents)
        stop = _match(text, start, content, next_piece, is_last)
        if stop is None:
            return None
        spans.append((start, stop))
        start = stop + len(next_piece)
    return spans


def _match(text: str, start: int, content: str, next_piece: str, is_last: bool) -> int | None:
    """Return the end of `content` at `start`, followed by `next_piece`; None if it is not there.

    is_last: whether the text must end after `next_piece`.
    """
    for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
        stop = start + len(variant)
        if text.startswith(variant + next_piece, start) and (
            not is_last or stop + len(next_piece) == len(text)
        ):
            return stop
    words = r"\s+".join(map(re.escape, content.split()))
    pattern = rf"({words}){re.escape(next_piece)}{'$' if is_last else ''}"
    match = re.compile(pattern).match(text, start)
    return match.end(1) if match else None
