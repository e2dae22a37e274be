"""Texts laid against each other: where contents stand between pieces that are known."""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]
"""[start, stop) in characters."""


def common_start(one: str, other: str) -> str:
    """The longest text that both begin with."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return one[:length]


def mark(number: int) -> str:
    """Private-use characters, which no trimming touches, around the number of the message."""
    return f"\ue0a0{number}\ue0a1"


def split(text: str, marks: Sequence[str]) -> list[str] | None:
    """The pieces before, between and behind the marks; None unless each stands once, in order."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(piece)
    return [*pieces, text]


def align(text: str, pieces: list[str], contents: list[str]) -> list[Span] | None:
    """Where each content stands, if text is pieces and contents in turn; else None.

    A template may trim a content or change white space in it, and nothing else.
    """
    if not text.startswith(pieces[0]):
        return None
    at = len(pieces[0])
    spans: list[Span] = []
    for content, behind in zip(contents, pieces[1:], strict=True):
        stop = _match(text, at, content, behind, last=len(spans) + 1 == len(contents))
        if stop is None:
            return None
        spans.append((at, stop))
        at = stop + len(behind)
    return spans


def _match(text: str, at: int, content: str, behind: str, last: bool) -> int | None:
    for written in (content, content.strip(), content.rstrip(), content.lstrip()):
        stop = at + len(written)
        if text.startswith(written + behind, at) and (not last or stop + len(behind) == len(text)):
            return stop
    words = r"\s+".join(map(re.escape, content.split()))
    found = re.compile(rf"({words}){re.escape(behind)}{'$' if last else ''}").match(text, at)
    return found.end(1) if found else None
