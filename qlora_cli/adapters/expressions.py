"""Regular expressions from an adapter's files, matched in bounded time.

Python's `re` tries one way through an expression after the other, and `(a|a)*$` has 2^n ways. This
module computes the set of all positions that a part of the expression can end at, so that a
position is never visited twice for the same reason, and counts its work. What this cannot compute,
such as a reference to a group, is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

_MAX_PATTERN = 5_000
"""Length of a pattern. PEFT's and other programs' longest ones have some hundred characters."""
_MAX_WORK = 500_000
"""Number of positions that a match may visit, which takes less than a second."""
_MAX_DEPTH = 50
"""Number of groups inside one another."""
_PLAIN = re.compile(r"[\w.\\-]*")
"""Patterns without alternatives and repetitions, for which `re` takes no more time."""
_CATEGORIES = {
    f"CATEGORY_{sign}{name}": re.compile(letter.upper() if sign else letter)
    for name, letter in (("DIGIT", r"\d"), ("SPACE", r"\s"), ("WORD", r"\w"))
    for sign in ("", "NOT_")
}
_LEAVES = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"}
_GROUPS = {"BRANCH", "SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"}


class ExpressionError(ValueError):
    """A text that is no regular expression, or one that cannot be matched in bounded time."""


class Expression:
    """A regular expression that accepts the same texts as Python's `re`.

    Raises ExpressionError if the pattern is not one, or contains what is not supported.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _MAX_PATTERN:
            raise ExpressionError(f"it has {len(pattern):,} characters")
        try:
            self._compiled = re.compile(pattern)
            # The parser is a private module of `re`.
            self._parts = importlib.import_module("re._parser").parse(pattern)
        except (re.error, RecursionError, OverflowError) as fault:
            raise ExpressionError(f"it is not a regular expression: {fault}") from fault
        self._is_plain = _PLAIN.fullmatch(pattern) is not None
        self._ignores_case = bool(self._compiled.flags & re.IGNORECASE)
        if self._compiled.flags & ~(re.IGNORECASE | re.UNICODE):
            raise ExpressionError("it has flags that are not supported")
        _check(self._parts)

    def matches(self, text: str, starts: Iterable[int] = (0,)) -> bool:
        """Return whether the expression matches a text from one of some positions to its end.

        Raises ExpressionError if that takes too long.
        """
        if self._is_plain:
            return any(self._compiled.fullmatch(text, start) for start in starts)
        return len(text) in _Match(text, self._ignores_case).ends(self._parts, {*starts})


@lru_cache(maxsize=10_000)
def expression(pattern: str) -> Expression:
    """Return the expression of a pattern. Raises ExpressionError as `Expression` does."""
    return Expression(pattern)


def _check(parts: Any, depth: int = 0) -> None:
    """Raise ExpressionError if a part of a parsed expression is not supported."""
    if depth > _MAX_DEPTH:
        raise ExpressionError("its groups are nested too deeply")
    for operation, value in parts:
        name = str(operation)
        if name not in _LEAVES | _GROUPS:
            raise ExpressionError(f"{name.lower()} is not supported")
        if name == "SUBPATTERN" and (value[1] or value[2]):
            raise ExpressionError("flags of a group are not supported")
        if name in _GROUPS:
            for inner in _inner(name, value):
                _check(inner, depth + 1)


def _inner(name: str, value: Any) -> Sequence[Any]:
    """Return the sequences of parts that a group contains."""
    return value[1] if name == "BRANCH" else [value[-1]]


class _Match:
    """One match of an expression with a text."""

    def __init__(self, text: str, ignores_case: bool) -> None:
        self._text = text
        self._ignores_case = ignores_case
        self._work = 0

    def ends(self, parts: Any, starts: set[int]) -> set[int]:
        """Return the positions at which a sequence of parts can end that begins at `starts`."""
        for operation, value in parts:
            self._work += 1 + len(starts)
            if self._work > _MAX_WORK:
                raise ExpressionError("matching it takes too long")
            if not starts:
                return starts
            starts = self._after(str(operation), value, starts)
        return starts

    def _after(self, name: str, value: Any, starts: set[int]) -> set[int]:
        if name == "AT":
            return {start for start in starts if self._is_at(str(value), start)}
        if name == "BRANCH":
            return set().union(*(self.ends(branch, starts) for branch in value[1]))
        if name == "SUBPATTERN":
            return self.ends(value[-1], starts)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(value[-1], int(value[0]), int(value[1]), starts)
        if name in ("ASSERT", "ASSERT_NOT"):
            wanted = name == "ASSERT"
            return {
                start for start in starts if self._is_around(value[0], value[1], start) == wanted
            }
        end = len(self._text)
        return {at + 1 for at in starts if at < end and self._fits(name, value, self._text[at])}

    def _repeated(self, parts: Any, least: int, most: int, starts: set[int]) -> set[int]:
        """Return the ends of `least` to `most` repetitions."""
        current, result = starts, set[int]()
        count = 0
        while current and count < least:
            following = self.ends(parts, current)
            # Parts that can be empty reach more positions with each repetition, up to all.
            count = least if following == current else count + 1
            current = following
        while current:
            result |= current
            if count == most:
                break
            current, count = self.ends(parts, current) - result, count + 1
        return result

    def _is_around(self, direction: int, parts: Any, at: int) -> bool:
        """Return whether parts match after a position, or before it if `direction` is -1."""
        if direction > 0:
            return bool(self.ends(parts, {at}))
        start = at - int(parts.getwidth()[0])  # `re` accepts a fixed width only.
        return start >= 0 and at in self.ends(parts, {start})

    def _is_at(self, place: str, at: int) -> bool:
        text, end = self._text, len(self._text)
        if place in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return at == 0
        if place == "AT_END":
            return at == end or (at == end - 1 and text[at] == "\n")
        if place == "AT_END_STRING":
            return at == end
        before = at > 0 and _CATEGORIES["CATEGORY_WORD"].match(text[at - 1]) is not None
        after = at < end and _CATEGORIES["CATEGORY_WORD"].match(text[at]) is not None
        return (before != after) == (place == "AT_BOUNDARY")

    def _fits(self, name: str, value: Any, character: str) -> bool:
        """Return whether a part of one character fits."""
        if name == "ANY":
            return character != "\n"
        forms = {character}
        if self._ignores_case:
            forms |= {character.lower(), character.upper()}
        if name == "IN":
            negated = str(value[0][0]) == "NEGATE"
            items = value[1:] if negated else value
            return negated != any(_has(item, form) for item in items for form in forms)
        return (name == "LITERAL") == any(form == chr(value) for form in forms)


def _has(item: tuple[Any, Any], character: str) -> bool:
    """Return whether an item of a set of characters contains one."""
    operation, value = item
    if str(operation) == "LITERAL":
        return character == chr(value)
    if str(operation) == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    return _CATEGORIES[str(value)].match(character) is not None
