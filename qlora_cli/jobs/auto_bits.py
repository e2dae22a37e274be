"""Chooses `base.bits: auto` by measuring the base, or reads the choice of a run or the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_cli.events import Observer
from qlora_cli.jobs import mix_cache
from qlora_cli.jobs.measured_base import check_method, in_4_bit
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.jobs.quantize import base_bytes, measure, measured_rows
from qlora_cli.plan.limit import limit_of
from qlora_cli.plan.planner import Planner
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.resolve import Choice
from qlora_cli.runs.run import Run
from qlora_cli.units import format_bytes, parse_bytes

_BITS, _OVERRIDES = "base.bits", "base.overrides"


def choose_bits(
    prepared: Prepared, earlier: Run | None, observer: Observer
) -> tuple[Prepared, tuple[Choice, ...]]:
    """Return the recipe without `base.bits: auto`, and the choices made.

    earlier: the run that is resumed, which keeps its bits. Raises the errors of `measure`.
    """
    if prepared.recipe.base.bits != "auto":
        return prepared, ()
    check_method(prepared.recipe)
    choices = _stored(earlier) if earlier is not None else _choose(prepared, observer)
    values = {choice.key.removeprefix("base."): choice.value for choice in choices}
    recipe = with_settings(prepared.recipe, "base", **{"overrides": {}, **values}, budget=None)
    if recipe.base.all_bits == {16}:
        # The settings of 4 and 8 bit have no effect, so a recipe with them would be refused.
        recipe = recipe.model_copy(update={"base": recipe.base.without_quantization()})
    return replace(prepared, recipe=recipe, choices=(*prepared.choices, *choices)), choices


def _stored(earlier: Run) -> tuple[Choice, ...]:
    """Return the choices of an earlier process of the run."""
    base = earlier.recipe.base
    reasons = {entry["key"]: entry["reason"] for entry in earlier.record.get("choices", ())}
    values = {_BITS: base.bits, _OVERRIDES: dict(base.overrides)}
    return tuple(Choice(k, v, reasons.get(k, "as the run began")) for k, v in values.items())


def _choose(prepared: Prepared, observer: Observer) -> tuple[Choice, ...]:
    plain = replace(prepared, recipe=in_4_bit(prepared.recipe))
    least = base_bytes(plain)
    budget, text = _budget(prepared, plain, least)
    whole = replace(plain, recipe=with_settings(plain.recipe, "base", bits=16))
    if (needed := base_bytes(whole)) <= budget:
        return (Choice(_BITS, 16, f"16 bit needs {format_bytes(needed)} of {text}"),)
    if budget == least:
        return (Choice(_BITS, 4, f"no memory is left for more: {text}"),)
    found = _measured(plain, budget, observer)
    linears = f"{found['upgraded']} of {found['linears']} linears have more"
    reason = (
        f"{linears}, which gives a KL to 16 bit of {found['kl']:.3g} nats per token instead of "
    )
    reason += f"{found['plain_kl']:.3g}; {format_bytes(found['bytes'])} of {text}"
    overrides = Choice(_OVERRIDES, found["overrides"], "those with the lowest KL for their bytes")
    return Choice(_BITS, 4, reason), overrides


def _budget(prepared: Prepared, plain: Prepared, least: int) -> tuple[int, str]:
    """Return the bytes that the base may have, and the same in words.

    plain: with 4 bit. least: bytes of its base.
    """
    if prepared.recipe.base.budget is not None:
        budget = parse_bytes(prepared.recipe.base.budget)
        return budget, f"the {format_bytes(budget)} of base.budget"
    planner = Planner(plain.config, plain.profile, has_copy=plain.has_packed_copy)
    plan, limit = planner.plan(plain.recipe), limit_of(plain.profile)
    budget = least + max(0, limit.num_bytes - plan.needed_bytes)
    return budget, f"{format_bytes(budget)}, which the rest of the job leaves of {limit.text}"


def _measured(plain: Prepared, budget: int, observer: Observer) -> dict[str, Any]:
    """Return the mix for a budget, from the cache if it was measured before."""
    rows = measured_rows(plain, observer)
    found = mix_cache.read(plain, budget, rows)
    if found is not None:
        observer.note("base.bits: the choice of an earlier measurement is used")
        return found
    result = measure(plain, rows, budget, None, observer)
    return mix_cache.write(plain, rows, result)
