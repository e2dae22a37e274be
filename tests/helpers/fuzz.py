"""Damaged and absurd contents of files, for tests that only our own errors come out.

`QLORA_FUZZ=10000` runs that number of cases of each test, drawn at random; without it, the cases
are few and the same each time.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qlora_cli.errors import QloraError

_IS_LONG = "QLORA_FUZZ" in os.environ
CASES = int(os.environ.get("QLORA_FUZZ", "500"))
"""Number of cases of each test."""


def fuzzed(share: float = 1.0) -> settings:
    """Return the settings of a fuzz test.

    share: part of the cases that the short run has, for a test whose cases are slow.
    """
    return settings(
        max_examples=CASES if _IS_LONG else int(CASES * share),
        deadline=None,
        derandomize=not _IS_LONG,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


_ABSURD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400),
    *(0.0, -0.0, 0.5, -1.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "1e-4", "true", "x" * 5000, "\0", "\x1b[2J", "\ud800", "\u202e", "é\u0301"),
    *("../x", "/", "~nouser/x", "a/b", ".", "..", "{name}", "{{ 1 }}", "[", "(a+)+$", "nul\0l"),
    *([], {}, [[]], [{}], [None], {"": {}}, {"a": None}, [0] * 50),
]
absurd_values = st.one_of(
    st.sampled_from(_ABSURD).map(copy.deepcopy),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=8,
    ),
)
"""Values of JSON that a reader may not expect."""


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of a value and of all values inside."""
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, (*place, index))


@st.composite
def changed_values(draw: Callable[..., Any], *contents: Any) -> Any:
    """Draw one of some values of JSON, in which up to three places are changed."""
    value = copy.deepcopy(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _places(value) if place]
        if not places:
            return value
        *outer, last = draw(st.sampled_from(places))
        target = value
        for key in outer:
            target = target[key]
        how = draw(st.sampled_from(("set", "set", "remove", "add")))
        if how == "set":
            target[last] = draw(absurd_values)
        elif how == "remove":
            del target[last]
        elif isinstance(target, dict):
            target[draw(st.text(max_size=8))] = draw(absurd_values)
        else:
            target.insert(last, draw(absurd_values))
    return value


@st.composite
def damaged(draw: Callable[..., Any], *contents: bytes) -> bytes:
    """Draw one of some files, of which up to four parts are changed, or bytes without a meaning."""
    content = bytearray(draw(st.sampled_from((*contents, b""))))
    if not content:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 20)))
        how = draw(st.sampled_from(("flip", "cut", "write", "repeat", "end")))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:end]
        elif how == "write":
            content[at:end] = draw(st.binary(max_size=20))
        elif how == "repeat":
            content[at:at] = content[at:end] * draw(st.integers(1, 50))
        elif how == "end":
            del content[at:]
    return bytes(content)


def changed_json(*contents: Any) -> st.SearchStrategy[bytes]:
    """Draw the text of JSON with changed values, or with damaged bytes.

    contents: the values before the change.
    """
    texts = [json.dumps(content).encode() for content in contents]
    return st.one_of(
        changed_values(*contents).map(lambda value: json.dumps(value).encode()), damaged(*texts)
    )


def changed_lines(*contents: Mapping[str, Any]) -> st.SearchStrategy[bytes]:
    """Draw JSON lines of which some are changed. contents: the objects before the change."""
    whole = [json.dumps(content).encode() for content in contents]
    lines = st.one_of(st.sampled_from(whole), changed_json(*contents))
    return st.lists(lines, min_size=1, max_size=4).map(lambda parts: b"\n".join(parts) + b"\n")


@contextmanager
def only_own_errors() -> Iterator[None]:
    """Accept the package's own errors inside the block, and no other exception.

    The message must be one that a terminal and JSON can have.
    """
    message = "nothing is wrong"
    try:
        yield
    except QloraError as error:
        message = str(error)
    assert 0 < len(message) < 20_000, "the message repeats the content of a file"


def write(file: Path, content: bytes) -> Path:
    """Write a file and return its path."""
    file.write_bytes(content)
    return file
