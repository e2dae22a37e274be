"""Reading YAML: the scalars of YAML 1.2, line numbers, duplicate keys, refused documents."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.recipe.document import DocumentError, read_document, read_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        (".inf", ".inf"),
        ("1_000", "1_000"),
        ("'2e-4'", "2e-4"),
        ("[q, v]", ["q", "v"]),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_a_scalar_is_read_as_yaml_1_2(text: str, value: Any) -> None:
    result = read_value(text)
    assert result == value
    assert type(result) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read_back(number: float) -> None:
    assert math.isclose(read_value(repr(number)), number, rel_tol=0, abs_tol=0)


def test_lines_are_the_lines_of_the_keys() -> None:
    document = read_document("# header\nmodel:\n  name: x\n\ntrain: {lr: 1,\n  seed: 2}\n")
    assert document.lines["model",] == 2
    assert document.lines["model", "name"] == 3
    assert document.lines["train", "lr"] == 5
    assert document.lines["train", "seed"] == 6


def test_a_duplicate_key_is_reported_with_its_second_line() -> None:
    document = read_document("train:\n  lr: 1\n  lr: 2\n")
    assert document.duplicates == [(("train", "lr"), 3)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1", 2),
        ("a: &x 1\nb: *x", 2),
        ("a: 1\nb: !!python/object:os.system 1", 2),
        ("a: 1\n? [b]\n: 2", 2),
        ("a: 1\n---\nb: 1", 2),
        ("a: 1e999", 1),
        ("a: \x00", None),
    ],
)
def test_an_invalid_document_is_refused_with_its_line(text: str, line: int | None) -> None:
    with pytest.raises(DocumentError) as caught:
        read_document(text)
    assert caught.value.line == line


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a: !!int foo",
            "a: !!float x",
            "a: !!bool x",
            "a: !!timestamp x",
            "a: !!python/name:os.x",
        ),
        *("a: " + "9" * 4400, "a: " + "[" * 900 + "]" * 900),
        "".join(f"key{number}: 1\n" for number in range(3000)),
        "a: " + "x" * 1_000_001,
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_document_is_refused(text: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read_document(text)
    assert len(str(caught.value)) < 200
