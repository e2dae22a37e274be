"""Derive recipes that compare another method on the same job."""

from __future__ import annotations

from qlora_cli.recipe.schema import Recipe


def full_fine_tuning(recipe: Recipe) -> Recipe:
    """Return the recipe of full fine-tuning on the same rows, base and batches, in 16 bit.

    It is the baseline that the memory report compares LoRA with.
    """
    return recipe.model_copy(
        update={
            "adapter": type(recipe.adapter)(method="full"),
            "base": recipe.base.model_copy(
                update={"bits": 16, "overrides": {}, "budget": None, "residency": "device"}
            ),
            "train": recipe.train.model_copy(update={"optimizer": "adamw"}),
        }
    )
