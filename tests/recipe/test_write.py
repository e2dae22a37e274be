"""A recipe that is written as YAML is read back as the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.recipe.document import read_value
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.write import recipe_of, recipe_text, yaml_value

VALUES: tuple[Any, ...] = (
    *("rows.jsonl", "a b/c.jsonl", "1e5", ".5", "12", "true", "null", "", "a: b", "a #b", "- a"),
    *("starter:train", "[x]", "{x}", 'say "hi"', "C:\\rows", "ä.jsonl", "two\nlines", "*", "&a"),
    *(["a, b", "c"], ["q", "1", "true"], {"prompt": "my question", "completion": "null"}),
    *(None, True, 8, 0.04, 1e-4, 3),
)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_is_read_back(value: Any) -> None:
    assert read_value(f"key: {yaml_value(value)}") == {"key": value}


def test_a_recipe_is_read_back_with_its_reasons_as_comments(tmp_path: Path) -> None:
    choices = (
        Choice("model.name", "starter", "first"),
        Choice("data.train", ["a, b.jsonl", "c.jsonl"], "word " * 50),
        Choice("data.eval", None, ""),
        Choice("train.lr", 3e-3, "last"),
    )
    text = recipe_text(["Purpose.", "More."], choices)
    assert text.startswith("# Purpose.\n#\n# More.\nmodel:\n  # first\n  name: starter\n")
    assert max(map(len, text.splitlines())) <= 96
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    expected = recipe_of(choices).model_copy(update={"output": "runs/mine"})
    assert load_recipe(file) == expected
