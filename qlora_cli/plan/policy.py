"""Chooses which blocks are recomputed and the loss's chunk, by plans.

The fewer blocks are recomputed, the less is computed twice and the more memory is needed. So the
chosen policy is the one with the fewest recomputed blocks whose planned memory is within a limit.
The memory is almost a linear function of that number, and a dry run records three blocks of each
kind and repeats them, so a few plans of one recording find it. The plan of the chosen policy is a
dry run of exactly that policy.

The chunk is chosen so that the loss stays below the peak of the rest of the step. During the loss
every kept block has its tensors, so what the loss may use in addition is what the backward pass of
one block uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_cli.nn.loss import CHUNK_ELEMENTS
from qlora_cli.plan.dry_run import DryRun
from qlora_cli.plan.limit import Limit
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.search import largest_that_fits

MIN_CHUNK = 64
"""Fewest tokens of a chosen chunk; below that the head's matrix products become slow."""
_CHUNK_UNIT = 16
_CHUNK_SHARE = 0.9
"""Share of the largest possible chunk that is planned next, so that it also suits policies with
slightly less space."""
_WIDTHS = 0.75
"""Tensors of the MLP's width that the first chunk is compared with."""
_MAX_TRIES = 3
"""Number of chunks that are planned for one policy."""


@dataclass(frozen=True)
class Attempt:
    """A plan with its settings. chunk: tokens whose logits exist at once in the loss."""

    chunk: int
    plan: MemoryPlan


@dataclass(frozen=True)
class PolicySearch:
    """The policies and chunks of one recipe.

    dry: returns the dry run of the recipe with a chunk. limit: memory that a policy may need.
    chunk: the recipe's own, or None to choose it. first_chunk: the chunk that is planned first.
    """

    dry: Callable[[int], DryRun]
    limit: Limit
    chunk: int | None
    first_chunk: int

    def attempt(self, number: int, chunk: int | None = None) -> Attempt:
        """Plan `number` recomputed blocks, with a chunk with which the loss decides nothing.

        chunk: the first one to plan. If the loss decides the peak with the smallest chunk, that one
        is used.
        """
        chunk = self.chunk or chunk or self.first_chunk
        plan = self.dry(chunk).plan(number)
        for _ in range(_MAX_TRIES):
            if self.chunk or not plan.loss.decides or chunk <= MIN_CHUNK:
                break
            smaller = int(_CHUNK_SHARE * plan.loss.chunk_below_rest(chunk))
            chunk = max(MIN_CHUNK, min(smaller // _CHUNK_UNIT * _CHUNK_UNIT, chunk - 1))
            plan = self.dry(chunk).plan(number)
        return Attempt(chunk, plan)

    def fits(self, plan: MemoryPlan) -> bool:
        """Return whether a plan is within the limit."""
        return plan.needed_bytes <= self.limit.num_bytes

    def saved_by_next(self, found: Attempt) -> int | None:
        """Return the bytes that recomputing one more group of blocks saves.

        None if finding out needs another recording, or if no more blocks can be recomputed.
        """
        dry = self.dry(found.chunk)
        later = [number for number in dry.policies if number > found.plan.num_recomputed]
        if not later or not dry.is_recorded(later[0]):
            return None
        return found.plan.needed_bytes - dry.plan(later[0]).needed_bytes

    def with_fewer(self, found: Attempt) -> Iterator[MemoryPlan]:
        """Yield the plans with fewer recomputed blocks, each group more kept than before."""
        dry = self.dry(found.chunk)
        for number in reversed(dry.policies):
            if number < found.plan.num_recomputed:
                yield dry.plan(number)

    def fewest(self) -> Attempt:
        """Return the policy that recomputes the fewest blocks and is within the limit.

        If none is, the one with the least memory: recomputing every block, or all but the last.
        """
        none = self.attempt(0)
        policies = self.dry(none.chunk).policies
        if self.fits(none.plan) or len(policies) < 2:
            return none
        plans: dict[int, MemoryPlan] = {}

        def planned(kept: int) -> tuple[int, bool]:
            """Plan the policy that keeps `kept` groups of blocks."""
            number = policies[len(policies) - 1 - kept]
            plans[kept] = self.dry(none.chunk).plan(number)
            return plans[kept].needed_bytes, self.fits(plans[kept])

        upper = len(policies) - 2
        known = {upper + 1: none.plan.needed_bytes}
        kept = largest_that_fits(planned, upper, upper // 2, self.limit.num_bytes, known)
        if kept:
            return self.attempt(plans[kept].num_recomputed, none.chunk)
        # The last block's tensors are needed as soon as the backward pass begins, so keeping them
        # often needs no more memory.
        least = [self.attempt(number, none.chunk) for number in policies[-2:]]
        least.append(self.attempt(policies[-1], MIN_CHUNK))
        return min(least, key=lambda attempt: attempt.plan.needed_bytes)


def first_chunk(config: Any, num_tokens: int, num_targets: int) -> int:
    """Return the chunk that is planned first.

    Its logits have about as many values as the MLP's tensors that the backward pass of one block
    needs. A plan checks it. num_tokens, num_targets: of the largest micro-batch.
    """
    width, vocab_size = getattr(config, "intermediate_size", None), int(config.vocab_size)
    if not isinstance(width, int):  # Some configs have another name for it, some a list.
        width = 4 * int(config.hidden_size)
    guess = int(_WIDTHS * num_tokens * width / vocab_size)
    largest = max(1, min(CHUNK_ELEMENTS // vocab_size, num_targets))
    return min(largest, max(MIN_CHUNK, guess // _CHUNK_UNIT * _CHUNK_UNIT))
