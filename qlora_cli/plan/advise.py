"""Searches for changes of a recipe that make a job fit a device. Every change is planned.

If the recipe's activation policy is `auto`, every change is planned with the policy that needs the
least memory, which is the one that a job at the limit gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_cli.adapters.registry import method_of
from qlora_cli.data.positions import num_positions
from qlora_cli.device import DeviceProfile
from qlora_cli.plan.planner import Planner
from qlora_cli.plan.results import Advice
from qlora_cli.plan.search import largest_that_fits
from qlora_cli.plan.settle import least_memory
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.schema import Recipe

_SEQUENCE_UNIT = 64
"""Sequence lengths are searched in multiples of this."""
_MAX_MICRO_BATCH = 256
"""Upper end of the search for a micro-batch, unless the recipe's own is larger."""
_MAX_SEQ_LEN = 2**17
"""Upper end of the search for a sequence length if the config has no number of positions."""


def changes_that_fit(recipe: Recipe, planner: Planner) -> tuple[Advice, ...]:
    """Return single changes of a resolved recipe that save memory.

    Changes after which the job fits come first, the fastest of them first; then the others, that
    with the lowest peak first. If the frozen weights alone exceed the device's memory, only changes
    of the weights are planned.
    """
    recipe = least_memory(recipe)
    weights_fit = _weights_fit(recipe, planner)
    profile = planner.profile
    changes = _changes(recipe, profile) if weights_fit else _smaller_weights(recipe, profile)
    advice = [_advice(text, changed, recipe, planner) for text, changed in changes]
    sizes = (
        _sizes(recipe, recipe.data.seq_len, recipe.train.pass_size, recipe) if weights_fit else ()
    )
    for size in sizes:
        best = size.largest(planner)
        if best is not None and best < size.upper:
            advice.append(_advice(size.override(best), size.changed(best), recipe, planner))
    saving = [item for item in advice if item.saves_bytes > 0]
    return tuple(sorted(saving, key=_rank))


def largest_sizes(recipe: Recipe, planner: Planner) -> tuple[Advice, ...]:
    """Return the longest sequence and the largest micro-batch with which the job fits.

    The sequence length is searched at micro-batch 1, the micro-batch at the recipe's sequence
    length. The one that trains a token faster comes first. The result is empty if the frozen
    weights alone exceed the device's memory.
    """
    recipe = least_memory(recipe)
    if not _weights_fit(recipe, planner):
        return ()
    positions = num_positions(planner.config)
    prefix = recipe.adapter.prefix
    max_seq_len = _MAX_SEQ_LEN if positions is None else positions - prefix
    max_micro_batch = max(_MAX_MICRO_BATCH, recipe.train.pass_size)
    one_row = with_settings(recipe, "train", micro_batch=1)
    length, micro_batch = _sizes(recipe, max_seq_len, max_micro_batch, one_row)
    also = "" if recipe.train.pass_size == 1 else " train.micro_batch=1"
    advice = []
    by_model = "search" if positions is None else "model"
    for size, suffix, upper_limit in ((length, also, by_model), (micro_batch, "", "search")):
        best = size.largest(planner)
        if best is not None:
            change = f"{size.override(best)}{suffix}"
            limit = upper_limit if best + size.unit > size.upper else "memory"
            item = _advice(change, size.changed(best), recipe, planner)
            advice.append(replace(item, limit=limit))
    return tuple(sorted(advice, key=_rank))


def longest_sequence(recipe: Recipe, planner: Planner, max_seq_len: int) -> int | None:
    """Return the longest sequence with which a resolved recipe fits, in steps of 64 tokens.

    max_seq_len: upper end of the search. None if the job does not fit with any.
    """
    recipe = least_memory(recipe)
    if not _weights_fit(recipe, planner):
        return None
    return _sizes(recipe, max_seq_len, 1, recipe)[0].largest(planner)


def _weights_fit(recipe: Recipe, planner: Planner) -> bool:
    """Return whether the frozen weights alone fit the device; no batch can change that."""
    return planner.plan(recipe).frozen_bytes <= planner.profile.usable_bytes


def _changes(recipe: Recipe, profile: DeviceProfile) -> Iterator[tuple[str, Recipe]]:
    """Yield (override, changed recipe) for settings that save memory and cost speed or quality."""
    on_gpu = profile.kind == "cuda"
    if recipe.train.activation_checkpointing is not True:
        changed = with_settings(recipe, "train", activation_checkpointing=True)
        yield "train.activation_checkpointing=true", changed
    if on_gpu and recipe.train.offload_inputs is not True:
        changed = with_settings(recipe, "train", activation_checkpointing=True, offload_inputs=True)
        yield "train.activation_checkpointing=true train.offload_inputs=true", changed
    if profile.count == 1 and _may_update_in_backward(recipe):
        changed = with_settings(recipe, "train", update_in_backward=True, max_grad_norm=None)
        yield "train.update_in_backward=true train.max_grad_norm=null", changed
    if recipe.base.compute_dtype == "float32":
        yield "base.compute_dtype=bfloat16", with_settings(recipe, "base", compute_dtype="bfloat16")
    if not method_of(recipe.adapter).freezes_base:
        yield "adapter.method=lora", with_settings(recipe, "adapter", method="lora")
        return
    if recipe.train.optimizer == "adamw" and recipe.adapter.dtype == "float32":
        for optimizer in ("adamw8bit", *(["paged_adamw8bit"] if on_gpu else [])):
            yield (
                f"train.optimizer={optimizer}",
                with_settings(recipe, "train", optimizer=optimizer),
            )
    yield from _smaller_weights(recipe, profile)
    if not recipe.adapter.has_layers:
        return
    if recipe.adapter.rank > 8:
        yield "adapter.rank=8", with_settings(recipe, "adapter", rank=8)
    if recipe.adapter.targets == "all":
        yield "adapter.targets=[q,v]", with_settings(recipe, "adapter", targets=["q", "v"])


def _may_update_in_backward(recipe: Recipe) -> bool:
    """Return whether `train.update_in_backward` can be set without another size of a step."""
    train, dtypes = recipe.train, (recipe.base.compute_dtype, recipe.adapter.dtype)
    return not train.update_in_backward and train.grad_accum == 1 and "float16" not in dtypes


def _smaller_weights(recipe: Recipe, profile: DeviceProfile) -> Iterator[tuple[str, Recipe]]:
    """Yield (override, changed recipe) for frozen weights that need less memory."""
    for bits in (8, 4):
        if recipe.base.default_bits > bits:
            yield f"base.bits={bits}", with_settings(recipe, "base", bits=bits)
    if any(bits > recipe.base.default_bits for bits in recipe.base.overrides.values()):
        yield "base.overrides={}", with_settings(recipe, "base", overrides={})
    if recipe.base.bits == 4 and not recipe.base.double_quant:
        yield "base.double_quant=true", with_settings(recipe, "base", double_quant=True)
    if recipe.adapter.method != "lora":
        return
    recomputed = with_settings(recipe, "train", activation_checkpointing=True)
    if profile.count > 1 and recipe.base.residency != SHARD:
        yield f"base.residency={SHARD}", with_settings(recomputed, "base", residency=SHARD)
    if profile.kind == "cuda" and not recipe.base.is_streamed:
        yield "base.residency=host", with_settings(recomputed, "base", residency="host")


@dataclass(frozen=True)
class _Size:
    """A number in the recipe that can be searched, from `unit` to `upper` in steps of `unit`."""

    section: str
    name: str
    recipe: Recipe
    upper: int
    unit: int

    def override(self, value: int) -> str:
        """Return the override of the command line that sets this value."""
        return f"{self.section}.{self.name}={value}"

    def changed(self, value: int) -> Recipe:
        """Return the recipe with this value."""
        return with_settings(self.recipe, self.section, **{self.name: value})

    def largest(self, planner: Planner) -> int | None:
        """Return the largest multiple of the unit with which the job fits, or None."""

        def planned(multiple: int) -> tuple[int, bool]:
            plan = planner.plan(self.changed(multiple * self.unit))
            return plan.needed_bytes, planner.fits(plan)

        value = getattr(getattr(self.recipe, self.section), self.name)
        guess, upper = min(value, self.upper) // self.unit, self.upper // self.unit
        best = largest_that_fits(planned, upper, guess, planner.profile.usable_bytes)
        return best * self.unit or None


def _sizes(
    recipe: Recipe, max_seq_len: int, max_micro_batch: int, length_recipe: Recipe
) -> tuple[_Size, _Size]:
    """Return the sequence length, searched in `length_recipe`, and the micro-batch in `recipe`."""
    return (
        _Size("data", "seq_len", length_recipe, max_seq_len, _SEQUENCE_UNIT),
        _Size("train", "micro_batch", recipe, max_micro_batch, 1),
    )


def _rank(item: Advice) -> tuple[bool, float]:
    """Return what advice is sorted by: the time if the job then fits, else the memory."""
    return not item.fits, item.seconds_per_token if item.fits else item.peak_bytes


def _advice(change: str, changed: Recipe, recipe: Recipe, planner: Planner) -> Advice:
    """Return the advice for a change. recipe: the unchanged one."""
    plan, before = planner.plan(changed), planner.plan(recipe)
    seconds = planner.seconds_per_token(changed)
    return Advice(
        change,
        before.peak_bytes - plan.peak_bytes,
        plan.peak_bytes,
        planner.fits(plan),
        seconds_per_token=seconds,
        time_ratio=seconds / planner.seconds_per_token(recipe),
        time_source=planner.speed(changed).source,
    )
