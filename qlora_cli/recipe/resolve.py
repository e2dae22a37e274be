"""Every `auto` becomes a value with a reason, from facts about the device. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_cli.device import DeviceProfile
from qlora_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Choice:
    """One value chosen for the user."""

    key: str
    value: Any
    reason: str


def resolve(recipe: Recipe, device: DeviceProfile) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe with no `auto` left that a device decides, and each choice with its reason.

    `data.format: auto` stays: rows decide it, not the device.
    """
    choices: list[Choice] = []
    base = recipe.base
    if base.compute_dtype == "auto":
        choices.append(_compute_dtype(device))
    if base.residency == "auto":
        choices.append(Choice("base.residency", "device", "the packed base fits where it computes"))
    chosen = {choice.key.removeprefix("base."): choice.value for choice in choices}
    return recipe.model_copy(update={"base": base.model_copy(update=chosen)}), tuple(choices)


def _compute_dtype(device: DeviceProfile) -> Choice:
    if device.capability is None:
        reason = "a CPU computes float32 exactly and without slow conversions"
        return Choice("base.compute_dtype", "float32", reason)
    capability = "{}.{}".format(*device.capability)
    if device.capability >= (8, 0):
        reason = f"{device.name} (compute capability {capability}) has bfloat16 matrix units"
        return Choice("base.compute_dtype", "bfloat16", reason)
    reason = f"{device.name} (compute capability {capability}) has no bfloat16 matrix units"
    return Choice("base.compute_dtype", "float16", reason)
