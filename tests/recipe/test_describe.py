"""The described settings agree with the schema."""

from __future__ import annotations

import pytest

from qlora_cli.recipe.describe import field_at, json_schema, keys, settings
from qlora_cli.recipe.document import read_value
from qlora_cli.recipe.schema import Recipe


def test_every_setting_has_a_meaning_and_accepted_values() -> None:
    for setting in settings():
        assert setting.meaning, setting.key
        assert setting.accepts, setting.key


def test_the_keys_are_the_keys_of_the_settings() -> None:
    assert set(keys()) == {setting.key for setting in settings()}
    assert all(field_at(key) is not None for key in keys())


@pytest.mark.parametrize("key", ["train", "nothing", "train.nothing", "nothing.lr", ""])
def test_a_key_that_is_not_a_setting_has_no_field(key: str) -> None:
    assert field_at(key) is None


def test_defaults_are_valid_yaml() -> None:
    recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"train": "y"}}).model_dump()
    for setting in settings():
        if setting.default is not None:
            value = recipe
            for part in setting.key.split("."):
                value = value[part]
            assert read_value(setting.default) == value, setting.key


def test_the_json_schema_contains_the_meanings() -> None:
    content = json_schema()
    described = {**content["$defs"], "Recipe": content}
    lr = described["Train"]["properties"]["lr"]
    assert lr["description"] == next(s.meaning for s in settings() if s.key == "train.lr")
