"""Choose the bits of the base, the sequence length and the micro-batch for a device, by plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_cli.device import DeviceProfile
from qlora_cli.plan.advise import longest_sequence
from qlora_cli.plan.planner import Planner
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.settle import least_memory
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import format_bytes, format_count

RESERVE = 0.1
"""Share of the usable memory that choices leave free: other programs use the GPU, too, and rows
that are shorter than planned need a little more memory for attention."""
MAX_PASS_TOKENS = 4096
"""Largest number of tokens in a micro-batch of several sequences."""
MIN_SEQ_LEN = 64
"""Shortest sequence that is planned for a device on which longer ones do not fit."""
_BITS = (16, 8, 4)


class SizeChooser:
    """Chooses sizes with which a job fits a device and `RESERVE` of its memory stays free.

    config: transformers' config of the base. profile: the target device.
    """

    def __init__(self, config: Any, profile: DeviceProfile) -> None:
        self.profile = profile
        reserved = int(profile.usable_bytes * RESERVE)
        self.planner = Planner(
            config, replace(profile, context_bytes=profile.context_bytes + reserved)
        )

    @property
    def limit_bytes(self) -> int:
        """Memory that a chosen job may need."""
        return self.planner.profile.usable_bytes

    def needed(self, recipe: Recipe) -> str:
        """Return the memory that a resolved recipe needs at least, as text."""
        return format_bytes(self.planner.plan(least_memory(recipe)).needed_bytes)

    def bits(self, recipe: Recipe) -> Choice | None:
        """Return the largest bits of the base with which the recipe fits.

        The plans are those of the recipe's sequence length with one sequence per micro-batch. None
        if not even 4 bit fits.
        """
        too_large: list[str] = []
        for bits in _BITS:
            changed = with_settings(recipe, "base", bits=bits)
            if self.fits(changed):
                return Choice("base.bits", bits, self._bits_reason(bits, changed, too_large))
            too_large.append(f"{bits} bit ({self.needed(changed)})")
        return None

    def _bits_reason(self, bits: int, recipe: Recipe, too_large: list[str]) -> str:
        size = f"{format_count(recipe.data.seq_len)} tokens need {self.needed(recipe)} of "
        size += self.memory_text()
        if bits == _BITS[0]:
            return f"16 bit fits, so the base is not quantized: {size}"
        larger = " and ".join(too_large)
        return f"the largest that fits: {size}; {larger} {_need(len(too_large))} more"

    def seq_len(self, recipe: Recipe) -> Choice | None:
        """Return the longest sequence with which the recipe fits, at most the recipe's own."""
        wanted = recipe.data.seq_len
        longest = longest_sequence(recipe, self.planner, wanted)
        if longest is None:
            return None
        changed = with_settings(recipe, "data", seq_len=longest)
        reason = (
            f"the longest that fits: {self.needed(changed)} of {format_bytes(self.limit_bytes)}; "
            f"the rows would need {format_count(wanted)}"
        )
        return Choice("data.seq_len", longest, reason)

    def smallest(self, recipe: Recipe) -> MemoryPlan:
        """Return the plan of a recipe in 4 bit with the shortest sequence."""
        small = with_settings(recipe, "data", seq_len=min(MIN_SEQ_LEN, recipe.data.seq_len))
        return self.planner.plan(least_memory(with_settings(small, "base", bits=4)))

    def micro_batch(self, recipe: Recipe, batch: int) -> tuple[Choice, Choice]:
        """Return the sequences per pass, a power of two, and the passes per update.

        batch: sequences per update, a power of two.
        """
        upper = 1
        while 2 * upper <= batch and 2 * upper * recipe.data.seq_len <= MAX_PASS_TOKENS:
            upper *= 2
        chosen = upper
        while chosen > 1 and not self.fits(_split(recipe, batch, chosen)):
            chosen //= 2
        if chosen < upper:
            larger = _split(recipe, batch, 2 * chosen)
            limit = f"{format_count(2 * chosen)} sequences would need {self.needed(larger)}"
        elif chosen == batch:
            limit = "an update has no more sequences"
        else:
            limit = (
                f"a pass of several sequences has at most {format_count(MAX_PASS_TOKENS)} tokens"
            )
        reason = (
            f"{format_count(chosen)} x {format_count(recipe.data.seq_len)} tokens per pass need "
            f"{self.needed(_split(recipe, batch, chosen))} of {format_bytes(self.limit_bytes)}; "
            f"{limit}"
        )
        return (
            Choice("train.micro_batch", chosen, reason),
            Choice("train.grad_accum", batch // chosen, ""),
        )

    def fits(self, recipe: Recipe) -> bool:
        """Return whether a resolved recipe fits with the `auto` values that need least memory."""
        return self.planner.fits(self.planner.plan(least_memory(recipe)))

    def memory_text(self) -> str:
        """Return the memory that may be planned: `6.75 GiB (90% of the usable memory)`."""
        return f"{format_bytes(self.limit_bytes)} ({1 - RESERVE:.0%} of the usable memory)"


def _split(recipe: Recipe, batch: int, micro_batch: int) -> Recipe:
    """Return the recipe with `batch` sequences per update, in passes of `micro_batch`."""
    return with_settings(recipe, "train", micro_batch=micro_batch, grad_accum=batch // micro_batch)


def _need(number: int) -> str:
    return "need" if number > 1 else "needs"
