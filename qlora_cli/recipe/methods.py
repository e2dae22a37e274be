"""Recipes derived from another recipe, to compare methods on the same job."""

from __future__ import annotations

from qlora_cli.recipe.schema import Recipe


def full_fine_tuning(recipe: Recipe) -> Recipe:
    """The same job with every weight trained, which the adapter's saving is measured against."""
    return recipe.model_copy(
        update={
            "adapter": type(recipe.adapter)(method="full"),
            "base": recipe.base.model_copy(update={"bits": 16}),
            "train": recipe.train.model_copy(update={"optimizer": "adamw"}),
        }
    )
