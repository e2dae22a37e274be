"""Replace each `auto` of a recipe that depends on the device by a value, with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.device import DeviceProfile
from qlora_cli.recipe.describe import to_yaml
from qlora_cli.recipe.preference import Preference
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.section import Section

RESIDENCY = "base.residency"
_SHOWN_ENTRIES = 3
"""Longest mapping that is shown."""


@dataclass(frozen=True)
class Choice:
    """An automatic choice: the setting's dotted key, the chosen value and the reason."""

    key: str
    value: Any
    reason: str

    @property
    def text(self) -> str:
        """Return `key = value: reason`; of a long mapping the number of its entries."""
        shown = self.value
        if isinstance(shown, dict):
            number = len(shown)
            shown = to_yaml(shown) if number <= _SHOWN_ENTRIES else f"{number} entries"
        return f"{self.key} = {shown}: {self.reason}"


def resolve(recipe: Recipe, device: DeviceProfile) -> tuple[Recipe, tuple[Choice, ...]]:
    """Return the recipe with the `auto` values resolved for a device, and the choices made.

    `data.format: auto` is kept, because it depends on the rows, `base.cache: auto`, because it
    depends on the size of the base, and on a GPU `base.residency: auto`, because it depends on the
    planned memory.
    """
    choices: list[Choice] = []
    base = recipe.base
    if base.compute_dtype == "auto":
        choices.append(_compute_dtype(device))
    if base.residency == "auto" and device.kind == "cpu":
        reason = "on a CPU all weights are in host memory"
        choices.append(Choice(RESIDENCY, "device", reason))
    if recipe.task == "preference" and recipe.preference.beta == "auto":
        choices.append(_beta(recipe.preference))
    sections = {
        name: _with_choices(getattr(recipe, name), name, choices) for name in ("base", "preference")
    }
    return recipe.model_copy(update=sections), tuple(choices)


def _with_choices(section: Section, name: str, choices: Sequence[Choice]) -> Section:
    """Return a section of the recipe with the choices of its settings. name: of the section."""
    prefix = f"{name}."
    chosen = {c.key.removeprefix(prefix): c.value for c in choices if c.key.startswith(prefix)}
    return section.model_copy(update=chosen)


def _beta(preference: Preference) -> Choice:
    if preference.loss == "simpo":
        reason = "SimPO multiplies log-probabilities per token, and its paper uses 2.0 to 2.5"
        return Choice("preference.beta", 2.0, reason)
    return Choice("preference.beta", 0.1, f"a common value for {preference.loss}")


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
