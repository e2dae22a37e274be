"""What `train.activation_checkpointing` means for a base with a number of blocks."""

from __future__ import annotations

from qlora_cli.errors import Problem, RecipeError

KEY = "train.activation_checkpointing"
OFFLOAD_KEY = "train.offload_inputs"


def recomputed_blocks(setting: str | bool | int, num_blocks: int) -> int:
    """Return the number of first blocks that are recomputed in the backward pass.

    setting: without `auto`. Raises RecipeError if there are fewer blocks than the setting names.
    """
    assert setting != "auto", "a policy is chosen by a plan before the model is built"
    if isinstance(setting, bool):
        return num_blocks if setting else 0
    number = int(setting)
    if number > num_blocks:
        raise RecipeError(
            "the recipe recomputes more blocks than the base has",
            [Problem(KEY, f"{number} is more than the base's {num_blocks} blocks; true is all")],
        )
    return number
