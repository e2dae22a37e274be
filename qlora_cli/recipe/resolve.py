"""Every `auto` becomes a value with a reason, from facts about the device. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class DeviceFacts:
    """What choices depend on.

    kind: cpu | cuda. capacity_bytes: memory of the card, or of the machine. capability: CUDA
    compute capability, (8, 9) for an RTX 4090; None on a CPU. multiprocessors: of the card, 0 on
    a CPU. context_bytes: of the capacity, what the CUDA context and others take. imagined: a card
    that is not here, described by hand (`--vram`).
    """

    kind: str
    name: str
    capacity_bytes: int
    capability: tuple[int, int] | None = None
    multiprocessors: int = 0
    context_bytes: int = 0
    imagined: bool = False

    @property
    def usable_bytes(self) -> int:
        """What is left for a job."""
        return max(0, self.capacity_bytes - self.context_bytes)


@dataclass(frozen=True)
class Choice:
    """One value chosen for the user."""

    key: str
    value: Any
    reason: str


def resolve(recipe: Recipe, device: DeviceFacts) -> tuple[Recipe, tuple[Choice, ...]]:
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


def _compute_dtype(device: DeviceFacts) -> Choice:
    if device.capability is None:
        reason = "a CPU computes float32 exactly and without slow conversions"
        return Choice("base.compute_dtype", "float32", reason)
    capability = "{}.{}".format(*device.capability)
    if device.capability >= (8, 0):
        reason = f"{device.name} (compute capability {capability}) has bfloat16 matrix units"
        return Choice("base.compute_dtype", "bfloat16", reason)
    reason = f"{device.name} (compute capability {capability}) has no bfloat16 matrix units"
    return Choice("base.compute_dtype", "float16", reason)
