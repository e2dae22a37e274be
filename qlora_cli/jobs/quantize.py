"""`qlora quantize`: what quantization costs, and the cheapest mix of 4, 8 and 16 bit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_cli.errors import DoesNotFit
from qlora_cli.events import Observer
from qlora_cli.export.compare.eval_rows import EvalRows, eval_rows
from qlora_cli.files.atomic import atomic_file, report_write_errors
from qlora_cli.jobs import mix_cache
from qlora_cli.jobs.init import check_target
from qlora_cli.jobs.measured_base import (
    LIMITS,
    check_method,
    check_rows,
    in_4_bit,
    measured_base,
)
from qlora_cli.jobs.prepare import Prepared, prepare
from qlora_cli.jobs.quantize_results import LinearCost, MixStep, QuantizeResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.nn.packed_tensors import packed_specs
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.plan.planner import Planner
from qlora_cli.plan.settle import least_memory
from qlora_cli.proof.prove import require_proof
from qlora_cli.quantize.measurement import ALL_BITS, MeasuredBase
from qlora_cli.quantize.mix import LinearSize, mix_bytes, overrides_of
from qlora_cli.quantize.search import Found, find_mix
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.describe import sections
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.write import recipe_text
from qlora_cli.tasks.registry import task_of
from qlora_cli.units import format_bytes, parse_bytes

DEFAULT_SHARE = 0.1
"""Budget without an option: this share more bytes than the base in 4 bit."""
_BASE_CATEGORIES = ("base", "quant_constants", "embeddings", "head")


def run(
    recipe: Recipe,
    *,
    budget: int | None,
    target_kl: float | None,
    out: Path | None,
    observer: Observer,
    force: bool = False,
) -> QuantizeResult:
    """Measure the recipe's base and find a mix.

    budget: bytes of the base, as the memory report counts it. target_kl: instead of a budget. With
    neither, the budget is that of the recipe, or a tenth more than 4 bit. The cache keeps a mix for
    a budget. out: a recipe with the mix is written to it.
    force: replace an existing file. Raises UsageError or ModelError for what cannot be measured,
    DoesNotFit if 4 bit exceeds the budget.
    """
    if out is not None:
        check_target(out, force=force)
    check_method(recipe)
    prepared = prepare(in_4_bit(recipe), inspect_device())
    require_proof(prepared.config, task_of(recipe), observer)
    if budget is None and target_kl is None and recipe.base.budget is not None:
        budget = parse_bytes(recipe.base.budget)
    rows = measured_rows(prepared, observer)
    result = measure(prepared, rows, budget, target_kl, observer)
    if target_kl is None:
        mix_cache.write(prepared, rows, result)
    if out is None:
        return result
    with report_write_errors("the recipe", out), atomic_file(out) as partial:
        partial.write_text(_recipe_text(recipe, result), encoding="utf-8")
    return replace(result, out=out)


def measure(
    prepared: Prepared,
    rows: EvalRows,
    budget: int | None,
    target_kl: float | None,
    observer: Observer,
) -> QuantizeResult:
    """Return the result for a prepared recipe with a base of 4 bit; arguments as of `run`."""
    began = time.perf_counter()
    base = measured_base(prepared, rows, observer)
    sizes = linear_sizes(base)
    linears_4bit = mix_bytes(sizes, {size.path: 4 for size in sizes})
    total = base_bytes(prepared)
    if budget is None and target_kl is None:
        budget = int(total * (1 + DEFAULT_SHARE))
    if budget is not None and budget < total:
        raise DoesNotFit(
            f"the base needs {format_bytes(total)} in 4 bit; {format_bytes(budget)} are not enough",
            hint="set a larger --budget or base.budget, or use a smaller model",
        )
    added = None if budget is None else budget - total
    found = find_mix(base, sizes, added, target_kl, observer)
    others = total - linears_4bit
    return QuantizeResult(
        rows=rows.origin,
        tokens=base.num_targets,
        loss_16bit=found.loss_16bit,
        budget_bytes=budget,
        target_kl=target_kl,
        reached=target_kl is None or found.steps[-1].measured <= target_kl,
        bits_8=_step(
            "8 bit", {s.path: 8 for s in sizes}, others, sizes, (None, found.kl_8bit), found
        ),
        steps=tuple(
            _step(
                "4 bit" if number == 0 else f"round {number}",
                step.bits,
                others,
                sizes,
                (step.predicted if number else None, step.measured),
                found,
            )
            for number, step in enumerate(found.steps)
        ),
        linears=_linears(base, found),
        out=None,
        seconds=time.perf_counter() - began,
    )


def base_bytes(prepared: Prepared) -> int:
    """Return the planned bytes of the recipe's base if all of it is on the device.

    These are linears, embeddings that are not in host memory, head and norms.
    """
    recipe = with_settings(least_memory(prepared.recipe), "base", residency="device")
    plan = Planner(prepared.config, prepared.profile).plan(recipe)
    phase = next(phase for phase in plan.phases if phase.name == "checkpoint")
    return sum(phase.at_peak.get(category, 0) for category in _BASE_CATEGORIES)


def linear_sizes(base: MeasuredBase) -> list[LinearSize]:
    """Return the packed sizes of every linear that can be quantized."""
    found = []
    for site in base.sites:
        num_bytes = {}
        for bits in ALL_BITS:
            weight_format = replace(base.default, bits=bits)
            linear = QuantLinear(site.in_features, site.out_features, False, weight_format)
            num_bytes[bits] = sum(spec.num_bytes for spec in packed_specs(linear).values())
        found.append(LinearSize(site.path, num_bytes))
    return found


def measured_rows(prepared: Prepared, observer: Observer) -> EvalRows:
    """Return the rows that are measured. Raises UsageError if there are none."""
    rows = eval_rows(prepared.recipe, prepared.folder, prepared.config, LIMITS)
    check_rows(rows)
    for note in rows.notes:
        observer.note(note)
    return rows


def _step(
    name: str,
    bits: Mapping[str, int],
    others: int,
    sizes: Sequence[LinearSize],
    kl: tuple[float | None, float],
    found: Found,
) -> MixStep:
    """Return a measured mix. others: bytes of the base without linears. kl: predicted, measured."""
    predicted, measured = kl
    plain = found.plain.measured
    return MixStep(
        name=name,
        bytes=others + mix_bytes(sizes, bits),
        overrides=overrides_of(bits),
        counts=dict(sorted(Counter(bits.values()).items())),
        predicted_kl=predicted,
        kl=measured,
        recovered=1 - measured / plain if plain else 0.0,
    )


def _linears(base: MeasuredBase, found: Found) -> tuple[LinearCost, ...]:
    """Return every linear, the largest cost in 4 bit first."""
    bits = found.steps[-1].bits
    costs = [
        LinearCost(
            site.path, bits[site.path], site.in_features * site.out_features, found.alone[site.path]
        )
        for site in base.sites
    ]
    return tuple(sorted(costs, key=lambda cost: -cost.kl[4]))


def _recipe_text(recipe: Recipe, result: QuantizeResult) -> str:
    """Return the recipe with the chosen mix, with the settings that the user wrote."""
    chosen, plain = result.chosen, result.plain
    reason = f"KL {chosen.kl:.3g} nats per token instead of {plain.kl:.3g} in 4 bit, with "
    reason += f"{format_bytes(chosen.bytes)} instead of {format_bytes(plain.bytes)}; measured by "
    reason += f"`qlora quantize` on {result.rows}"
    base = (recipe.base.model_fields_set - {"budget"}) | {"bits", "overrides"}
    overrides = dict(chosen.overrides)
    changed = with_settings(recipe, "base", bits=4, overrides=overrides, budget=None)
    choices = []
    for name in type(recipe).model_fields:
        value = getattr(changed, name)
        if name in sections():
            written = base if name == "base" else value.model_fields_set
            for key in type(value).model_fields:
                if key in written:
                    note = reason if (name, key) == ("base", "overrides") else ""
                    alias = type(value).model_fields[key].alias or key
                    choices.append(Choice(f"{name}.{alias}", getattr(value, key), note))
        elif name in recipe.model_fields_set and name != "output":
            choices.append(Choice(name, value, ""))
    header = [f"{recipe.model.name} with a mixed base, written by `qlora quantize`."]
    return recipe_text(header, choices)
