"""Returns recipes with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_cli.recipe.schema import Recipe


def with_values(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """Return the recipe with other values. values: by dotted key; they are not validated."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        recipe = with_settings(recipe, section, **{name: value})
    return recipe


def with_settings(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    """Return the recipe with other values of settings in one section. They are not validated."""
    changed_section = getattr(recipe, section).model_copy(update=changes)
    return recipe.model_copy(update={section: changed_section})
