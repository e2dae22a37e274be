"""Choices that are made for the user, as text."""

from __future__ import annotations

from qlora_cli.recipe.resolve import Choice


def test_a_short_mapping_is_shown_and_a_long_one_is_counted() -> None:
    columns = Choice("data.columns", {"text": "sentence"}, "the rows have no 'text'")
    assert columns.text == "data.columns = {text: sentence}: the rows have no 'text'"
    mix = Choice("base.overrides", {f"linear{number}": 8 for number in range(9)}, "it fits")
    assert mix.text == "base.overrides = 9 entries: it fits"
