"""Replace each `auto` of a recipe that depends on the device by a value, with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_cli.device import DeviceProfile
from qlora_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Choice:
    """An automatic choice: the setting's dotted key, the chosen value and the reason."""

    key: str
    value: Any
    reason: str


def resolve(recipe: Recipe, device: DeviceProfile) -> tuple[Recipe, tuple[Choice, ...]]:
    """Return the recipe with the `auto` values resolved for a device, and the choices made.

    `data.format: auto` is kept: it depends on the rows and not on the device.
    """
    choices: list[Choice] = []
    base = recipe.base
    if base.compute_dtype == "auto":
        choices.append(_compute_dtype(device))
    if base.residency == "auto":
        choices.append(
            Choice(
                "base.residency",
                "device",
                "the packed base is stored in the memory of the device that computes",
            )
        )
    chosen = {choice.key.removeprefix("base."): choice.value for choice in choices}
    return recipe.model_copy(update={"base": base.model_copy(update=chosen)}), tuple(choices)


def _compute_dtype(device: DeviceProfile) -> Choice:
    if device.capability is None:
        reason = "on a CPU, float32 needs no conversion and no rounding to 16 bit"
        return Choice("base.compute_dtype", "float32", reason)
    capability = "{}.{}".format(*device.capability)
    if device.capability >= (8, 0):
        reason = (
            f"{device.name} (compute capability {capability}) supports bfloat16 matrix products"
        )
        return Choice("base.compute_dtype", "bfloat16", reason)
    reason = (
        f"{device.name} (compute capability {capability}) does not support bfloat16 matrix products"
    )
    return Choice("base.compute_dtype", "float16", reason)
