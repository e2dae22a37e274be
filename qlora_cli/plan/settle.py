"""Replaces each `auto` of a recipe that depends on planned memory by a value, with a reason.

These are `train.micro_batch`, `train.activation_checkpointing`, `train.loss_chunk` and, on a GPU,
`base.residency`. The others are resolved without a plan (`recipe/resolve.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_cli.plan.dry_run import DryRun
from qlora_cli.plan.limit import Limit
from qlora_cli.plan.policy import MIN_CHUNK, Attempt, PolicySearch
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.residency import moved_choice, other_residencies
from qlora_cli.plan.search import largest_that_fits
from qlora_cli.plan.step_time import DeviceSpeed
from qlora_cli.recipe import activations
from qlora_cli.recipe.activations import recomputed_blocks
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.change import with_settings, with_values
from qlora_cli.recipe.resolve import RESIDENCY, Choice
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import format_bytes, format_count

RESIDENT_INPUTS = 3
"""Inputs that are on the device at any time if inputs are moved to host memory."""
_CHUNK = "train.loss_chunk"


@dataclass(frozen=True)
class Settled:
    """A recipe without `auto` values that depend on memory, the choices made, and its plan."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    plan: MemoryPlan


@dataclass(frozen=True)
class Settler:
    """Chooses settings by plans.

    num_blocks: of the base. limit: memory that a job with chosen settings may need. dry: returns
    the dry run of a recipe, whose activation policy is not used. first_chunk: returns the chunk of
    the loss that is planned first for a recipe. nominal_speed: returns the speed of the device for
    a recipe, by which the time of recomputation is compared with that of copies. may_offload: the
    device is a GPU, so that inputs of blocks may be moved to host memory. num_devices: of the job,
    with a process each.
    """

    num_blocks: int
    limit: Limit
    dry: Callable[[Recipe], DryRun]
    first_chunk: Callable[[Recipe], int]
    nominal_speed: Callable[[Recipe], DeviceSpeed]
    may_offload: bool
    num_devices: int = 1

    def settle(self, recipe: Recipe) -> Settled:
        """Return the recipe with a policy, a chunk and a residency.

        recipe: its micro-batch is a number. A base that does not fit the device is shared among
        the devices of the job, or put into host memory, unless that does not help.
        """
        if recipe.base.residency != "auto":
            return self._settled(recipe)
        settled = self._settled(with_settings(recipe, "base", residency="device"))
        needed = settled.plan.needed_bytes
        what = f"{format_bytes(needed)} planned of {self.limit.text}"
        if needed <= self.limit.num_bytes:
            choice = Choice(RESIDENCY, "device", f"the base fits the device: {what}")
        elif not (others := other_residencies(recipe, self.num_devices)):
            choice = Choice(RESIDENCY, "device", f"the base cannot be in host memory: {what}")
        else:
            settled, choice = self._moved(recipe, settled, others, what)
        return replace(settled, choices=(choice, *settled.choices))

    def _moved(
        self, recipe: Recipe, resident: Settled, others: Sequence[str], what: str
    ) -> tuple[Settled, Choice]:
        """Return the first of the other residencies with which the job fits, and the choice.

        If none fits, it is the one that needs the least memory. resident: with the base on the
        device. what: the memory that it needs.
        """
        best, residency = resident, "device"
        for other in others:
            found = self._settled(with_settings(recipe, "base", residency=other))
            if found.plan.needed_bytes < best.plan.needed_bytes:
                best, residency = found, other
            if found.plan.needed_bytes <= self.limit.num_bytes:
                break
        if residency == "device":
            return best, Choice(RESIDENCY, residency, f"host memory would save nothing: {what}")
        return best, moved_choice(residency, self.num_devices, best.plan, what)

    def _settled(self, recipe: Recipe) -> Settled:
        """Return the recipe with a policy and a chunk. recipe: its residency is not `auto`."""
        search = self._search(recipe)
        choices: list[Choice] = []
        if recipe.train.activation_checkpointing == "auto":
            found = self._fewest(recipe, search)
            search, found, moved = self._offloaded(recipe, search, found)
            choices = [self._policy_choice(recipe, search, found), *moved]
        else:
            found = search.attempt(self._recomputed(recipe))
            if not search.fits(found.plan):
                _, found, choices = self._offloaded(recipe, search, found)
        if recipe.train.loss_chunk == "auto":
            choices.append(_chunk_choice(found))
        values = {choice.key: choice.value for choice in choices}
        return Settled(with_values(recipe, values), tuple(choices), found.plan)

    def _fewest(self, recipe: Recipe, search: PolicySearch) -> Attempt:
        """Return the policy with the fewest recomputed blocks that fits.

        Only weights of recomputed blocks are sharded, so a sharded base has at least one.
        """
        found = search.fewest()
        if recipe.base.residency == SHARD and not found.plan.num_recomputed:
            return search.attempt(self.dry(recipe).policies[1], found.chunk)
        return found

    def micro_batch(self, recipe: Recipe, max_size: int) -> tuple[Recipe, tuple[Choice, Choice]]:
        """Return the recipe with the largest micro-batch that fits, and the choices.

        The product of micro_batch and grad_accum stays the same. If the policy is `auto` too, a
        larger micro-batch may not need more recomputed blocks than one sequence does, because
        recomputation costs more time than short passes. max_size: largest number of sequences.
        """
        total = recipe.train.grad_accum
        sizes = [n for n in range(1, min(total, max_size) + 1) if total % n == 0]
        settled = self.settle(_divided(recipe, 1))
        first = settled.plan
        recipe = with_settings(recipe, "base", residency=settled.recipe.base.residency)
        plans = {1: first}

        def planned(number: int) -> tuple[int, bool]:
            """Plan the micro-batch `sizes[number - 1]`."""
            size = sizes[number - 1]
            if size not in plans:
                search = self._search(_divided(recipe, size))
                plans[size] = search.attempt(first.num_recomputed).plan
            needed = plans[size].needed_bytes
            return needed, needed <= self.limit.num_bytes

        best = largest_that_fits(planned, len(sizes), 2, self.limit.num_bytes)
        size = sizes[max(best, 1) - 1]
        larger = min((other for other in plans if other > size), default=None)
        reason = f"{_sequences(size)} need {format_bytes(plans[size].needed_bytes)} of "
        reason += self.limit.text
        if larger:
            reason += f"; {larger} would need {format_bytes(plans[larger].needed_bytes)}"
        changed = _divided(recipe, size)
        accum = Choice("train.grad_accum", total // size, f"{_sequences(total)} per step")
        return changed, (Choice("train.micro_batch", size, reason), accum)

    def _offloaded(
        self, recipe: Recipe, search: PolicySearch, found: Attempt
    ) -> tuple[PolicySearch, Attempt, list[Choice]]:
        """Return a policy that also moves inputs to host memory, if the recipe may and it helps.

        It helps if the job does not fit otherwise, or if recomputing fewer blocks saves more time
        than the copies take. search, found: the policy without it.
        """
        nothing = search, found, list[Choice]()
        may_offload = self.may_offload and recipe.train.offload_inputs == "auto"
        if not may_offload or not found.plan.num_recomputed:
            return nothing
        other = self._search(with_settings(recipe, "train", offload_inputs=True))
        if search.fits(found.plan):
            number = self._fewer_with_copies(recipe, search, found)
            moved = other.attempt(number, found.chunk) if number is not None else None
            if moved is None or not other.fits(moved.plan):
                return nothing
            reason = f"without it {found.plan.num_recomputed} blocks would be recomputed, with it "
            reason += f"{moved.plan.num_recomputed}, which is faster by estimate"
        else:
            policy = recipe.train.activation_checkpointing
            number = None if policy == "auto" else found.plan.num_recomputed
            moved = other.fewest() if number is None else other.attempt(number, found.chunk)
            if moved.plan.needed_bytes >= found.plan.needed_bytes:
                return nothing
            reason = f"without it {format_bytes(found.plan.needed_bytes)} are needed of "
            reason += f"{self.limit.text}, with it {format_bytes(moved.plan.needed_bytes)}"
        reason += f"; {format_bytes(moved.plan.moved_inputs)} per micro-batch are copied to host "
        reason += "memory and back"
        return other, moved, [Choice(activations.OFFLOAD_KEY, True, reason)]

    def _fewer_with_copies(
        self, recipe: Recipe, search: PolicySearch, found: Attempt
    ) -> int | None:
        """Return a number of recomputed blocks with which copies of inputs save time, or None.

        It is the smallest one that fits if all but `RESIDENT_INPUTS` inputs leave the device. Only
        plans without copies are made for it, which are quick.
        """
        limit, best = self.limit.num_bytes, None
        for plan in search.with_fewer(found):
            inputs = plan.num_recomputed - RESIDENT_INPUTS
            if plan.needed_bytes - inputs * plan.input_bytes > limit or inputs < 1:
                break
            best = plan
        if best is None:
            return None
        copied = (2 * best.num_recomputed - 1) * best.input_bytes
        flops = found.plan.flops.recomputed - best.flops.recomputed
        speed = self.nominal_speed(recipe)
        saved = flops / best.flops.micro_batches / speed.flops_per_second
        return best.num_recomputed if saved > copied / speed.link_bytes_per_second else None

    def _recomputed(self, recipe: Recipe) -> int:
        return recomputed_blocks(recipe.train.activation_checkpointing, self.num_blocks)

    def _search(self, recipe: Recipe) -> PolicySearch:
        chunk = recipe.train.loss_chunk
        return PolicySearch(
            lambda tokens: self.dry(with_settings(recipe, "train", loss_chunk=tokens)),
            self.limit,
            None if chunk == "auto" else chunk,
            self.first_chunk(recipe),
        )

    def _policy_choice(self, recipe: Recipe, search: PolicySearch, found: Attempt) -> Choice:
        """Return the choice of a policy: what it needs and costs, and what the next one would."""
        plan = found.plan
        number, total = plan.num_recomputed, plan.num_blocks
        needed = format_bytes(plan.needed_bytes)
        more = f"{plan.flops.recomputed_share:.1%} more operations"
        if not number:
            reason = f"every block keeps its activations: {needed} planned of {self.limit.text}"
        elif search.fits(plan):
            fewest = "the fewest that fit"
            if recipe.base.residency == SHARD:
                fewest += " and share weights"
            reason = f"{number} of {total} blocks are recomputed, {fewest}: {needed} "
            reason += f"planned of {self.limit.text}; {more}"
        else:
            reason = f"{number} of {total} blocks are recomputed, which needs the least memory: "
            reason += f"{needed} planned, and {self.limit.text} should not be exceeded; {more}"
        if number < total and search.fits(plan):
            reason += f". One step less memory{_step_text(search, found)} would cost "
            reason += f"{plan.flops.block_share:.1%} more operations"
        return Choice(activations.KEY, number, reason)


def _step_text(search: PolicySearch, found: Attempt) -> str:
    """Return ` (24 MiB less)`, what recomputing one more block or group of blocks saves."""
    saved = search.saved_by_next(found)
    return f" ({format_bytes(saved)} less)" if saved and saved > 0 else ""


def least_memory(recipe: Recipe) -> Recipe:
    """Return the recipe with the values of `auto` that need the least memory and one plan."""
    train = recipe.train
    changes: dict[str, object] = {}
    if train.activation_checkpointing == "auto":
        changes["activation_checkpointing"] = True
    if train.loss_chunk == "auto":
        changes["loss_chunk"] = MIN_CHUNK
    if recipe.base.bits == "auto":
        recipe = with_settings(recipe, "base", bits=4, budget=None)
    return with_settings(recipe, "train", **changes)


def _divided(recipe: Recipe, size: int) -> Recipe:
    """Return the recipe with the sequences of a step in passes of `size`."""
    accum = recipe.train.grad_accum // size
    return with_settings(recipe, "train", micro_batch=size, grad_accum=accum)


def _chunk_choice(found: Attempt) -> Choice:
    loss = found.plan.loss
    during, rest = format_bytes(loss.loss_bytes), format_bytes(loss.rest_bytes)
    if loss.decides:
        reason = f"{during} are in use during the loss and {rest} at most in the rest of a step; "
        few = f"a micro-batch has no more than {format_count(found.chunk)} targets"
        reason += few if found.chunk < MIN_CHUNK else "a smaller chunk would be slow"
    else:
        reason = f"{during} are in use during the loss, not more than the {rest} of the rest of a "
        reason += "step"
    return Choice(_CHUNK, found.chunk, reason)


def _sequences(number: int) -> str:
    return f"{format_count(number)} sequence{'' if number == 1 else 's'}"
