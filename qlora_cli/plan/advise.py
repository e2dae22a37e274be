"""Single changes to a recipe that make a job fit a device, each of them planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_cli.device import DeviceProfile
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.results import Advice
from qlora_cli.recipe.schema import Recipe

Planned = Callable[[Recipe], MemoryPlan]
"""From a resolved recipe to its plan."""

_SEQUENCE_UNIT = 64
"""Sequence lengths are searched in multiples of this."""
_MOST_SEQUENCES = 256
"""Where the search for a micro-batch ends, if the recipe's own is not larger."""
_STRAIGHT = 6
"""Plans after which a search stops to trust the line through the last two."""
_LONGEST = 2**17
"""Where the config names no number of positions."""


def changes_that_fit(recipe: Recipe, planned: Planned, facts: DeviceProfile) -> tuple[Advice, ...]:
    """Changes that save memory: those that make the job fit first, of these the mildest first.

    Where the frozen weights alone are too many, only what makes them fewer is planned.
    """
    now, hopeless = planned(recipe).peak_bytes, _hopeless(recipe, planned, facts)
    changes = _smaller_weights(recipe) if hopeless else _changes(recipe, facts.kind == "cuda")
    advice = [_advice(text, planned(changed), now, facts) for text, changed in changes]
    sizes = () if hopeless else _sizes(recipe, recipe.data.seq_len, recipe.train.micro_batch)
    for size in sizes:
        found = size.largest(planned, facts)
        if found is not None and found[0] < size.top:
            advice.append(_advice(f"{size.key}={found[0]}", found[1], now, facts))
    saving = [one for one in advice if one.saves_bytes > 0]
    return tuple(sorted(saving, key=lambda one: (not one.fits, -one.peak_bytes)))


def largest(
    recipe: Recipe, config: Any, planned: Planned, facts: DeviceProfile
) -> tuple[Advice, ...]:
    """The longest sequence at micro-batch 1, the largest micro-batch at the recipe's length."""
    if _hopeless(recipe, planned, facts):
        return ()
    now = planned(recipe).peak_bytes
    longest = int(getattr(config, "max_position_embeddings", None) or _LONGEST)
    most = max(_MOST_SEQUENCES, recipe.train.micro_batch)
    alone = _with(recipe, "train", micro_batch=1)
    length, _ = _sizes(alone, longest, most)
    _, sequences = _sizes(recipe, longest, most)
    also = "" if recipe.train.micro_batch == 1 else " train.micro_batch=1"
    advice = []
    for size, more in ((length, also), (sequences, "")):
        found = size.largest(planned, facts)
        if found is not None:
            advice.append(_advice(f"{size.key}={found[0]}{more}", found[1], now, facts))
    return tuple(advice)


def _hopeless(recipe: Recipe, planned: Planned, facts: DeviceProfile) -> bool:
    """Whether the frozen weights alone are more than the device has, whatever the batch."""
    return planned(recipe).frozen_bytes > facts.usable_bytes


def _changes(recipe: Recipe, on_card: bool) -> Iterator[tuple[str, Recipe]]:
    """Settings that cost speed or a little quality, and save memory."""
    if not recipe.train.activation_checkpointing:
        changed = _with(recipe, "train", activation_checkpointing=True)
        yield "train.activation_checkpointing=true", changed
    if recipe.base.compute_dtype == "float32":
        yield "base.compute_dtype=bfloat16", _with(recipe, "base", compute_dtype="bfloat16")
    if recipe.adapter.method == "full":
        yield "adapter.method=lora", _with(recipe, "adapter", method="lora")
        return
    if recipe.train.optimizer == "adamw" and recipe.adapter.dtype == "float32":
        for optimizer in ("adamw8bit", *(["paged_adamw8bit"] if on_card else [])):
            yield f"train.optimizer={optimizer}", _with(recipe, "train", optimizer=optimizer)
    yield from _smaller_weights(recipe)
    if recipe.adapter.rank > 8:
        yield "adapter.rank=8", _with(recipe, "adapter", rank=8)
    if recipe.adapter.targets == "all":
        yield "adapter.targets=[q,v]", _with(recipe, "adapter", targets=["q", "v"])


def _smaller_weights(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Formats of the frozen weights that take less."""
    for bits in (8, 4):
        if recipe.base.bits > bits:
            yield f"base.bits={bits}", _with(recipe, "base", bits=bits)
    if recipe.base.bits == 4 and not recipe.base.double_quant:
        yield "base.double_quant=true", _with(recipe, "base", double_quant=True)


@dataclass(frozen=True)
class _Size:
    """A number of the recipe that can be larger or smaller: from `unit` to `top`."""

    section: str
    name: str
    recipe: Recipe
    top: int
    unit: int

    @property
    def key(self) -> str:
        """As on the command line."""
        return f"{self.section}.{self.name}"

    def largest(self, planned: Planned, facts: DeviceProfile) -> tuple[int, MemoryPlan] | None:
        """(largest multiple of the unit that fits, its plan); None where none does.

        Memory grows almost in a straight line with a size, so the line through the last two plans
        is followed for some plans; what is left is halved.
        """
        low, high, best = 0, self.top // self.unit + 1, None
        known: dict[int, int] = {}
        guess = max(1, min(getattr(getattr(self.recipe, self.section), self.name), self.top))
        guess = max(1, guess // self.unit)
        while high - low > 1:
            size = guess * self.unit
            imagined = planned(_with(self.recipe, self.section, **{self.name: size}))
            known[guess] = imagined.reserved_bytes or imagined.peak_bytes
            if imagined.fits(facts.usable_bytes):
                low, best = guess, (size, imagined)
            else:
                high = guess
            guess = _next(known, low, high, facts.usable_bytes)
        return best


def _next(known: Mapping[int, int], low: int, high: int, limit: int) -> int:
    """Where to look between `low` and `high`, both left out."""
    middle = (low + high) // 2
    if len(known) == 1:  # Not far, as a plan of many more tokens takes longer.
        return min(2 * low, high - 1) if low else middle
    if len(known) > _STRAIGHT:
        return middle
    (one, at_one), (two, at_two) = list(known.items())[-2:]
    if at_one == at_two:
        return middle
    reached = two + math.floor((limit - at_two) * (two - one) / (at_two - at_one))
    return min(max(reached, low + 1), high - 1)


def _sizes(recipe: Recipe, longest: int, most: int) -> tuple[_Size, _Size]:
    """Length and number of the sequences."""
    length = _Size("data", "seq_len", recipe, longest, _SEQUENCE_UNIT)
    return length, _Size("train", "micro_batch", recipe, most, 1)


def _advice(change: str, imagined: MemoryPlan, now: int, facts: DeviceProfile) -> Advice:
    return Advice(
        change, now - imagined.peak_bytes, imagined.peak_bytes, imagined.fits(facts.usable_bytes)
    )


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update=changes)
    return recipe.model_copy(update={section: part})
