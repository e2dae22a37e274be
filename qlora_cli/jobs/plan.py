"""`qlora plan`: what a job will need, before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qlora_cli.data.collate import Batch, worst_batch
from qlora_cli.jobs.results import Advice, Compared, PlanResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.ledger import Device, Ledger, worst
from qlora_cli.recipe.resolve import DeviceFacts, resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.imagine import Imagined, full_fine_tuning, imagine, side
from qlora_cli.weights.locate import find_config, read_config

_COMPARED = (("full", 16), ("lora", 16), ("lora", 8), ("lora", 4))


def run(
    recipe: Recipe, *, device_facts: DeviceFacts | None, fit: bool, compare: bool
) -> PlanResult:
    """Plans the recipe for a device; this machine's where none is given.

    fit: advise the largest micro-batch and sequence that fit. compare: plan full fine-tuning and
    LoRA on 16, 8 and 4 bit too. Raises ModelError, RecipeError.
    """
    began = time.perf_counter()
    facts = device_facts or inspect_device()
    config = read_config(find_config(recipe.model.name, recipe.model.revision))
    resolved, _ = resolve(recipe, facts)
    imagined = plan(resolved, config, facts)
    before = plan(full_fine_tuning(resolved), config, facts)
    fits = imagined.peak_bytes <= facts.capacity_bytes
    advice = _largest(resolved, config, facts) if fit else ()
    if not fits and not fit:
        advice = _smaller(resolved, config, facts, imagined.peak_bytes)
    return PlanResult(
        device=asdict(facts),
        ledger=planned_ledger(resolved, facts, imagined, before),
        fits=fits,
        advice=advice,
        compare=_compare(resolved, config, facts) if compare else (),
        trainable_parameters=imagined.trainable_parameters,
        total_parameters=imagined.total_parameters,
        adapter_bytes=imagined.adapter_bytes,
        seconds=time.perf_counter() - began,
    )


def plan(
    recipe: Recipe, config: Any, facts: DeviceFacts, window: Sequence[Batch] | None = None
) -> Imagined:
    """Imagines a resolved recipe on `window`, or on the largest batches that it allows."""
    if window is None:
        worst_one = worst_batch(recipe.data.seq_len, recipe.train.micro_batch, config.vocab_size)
        window = [worst_one] * min(2, recipe.train.grad_accum)
    return imagine(recipe, config, facts, window, window[:1])


def planned_ledger(
    recipe: Recipe, facts: DeviceFacts, imagined: Imagined, before: Imagined
) -> Ledger:
    """The plan as a ledger, nothing of it measured."""
    return Ledger(
        device=Device(facts.kind, facts.name, facts.capacity_bytes),
        phases=imagined.phases,
        before=side(full_fine_tuning(recipe), before.phases, "planned"),
        after=side(recipe, imagined.phases, "planned"),
        planned_peak_bytes=imagined.peak_bytes,
        measured_peak_bytes=0,
        instrument="planned: the same job on imagined tensors",
    )


def _compare(recipe: Recipe, config: Any, facts: DeviceFacts) -> tuple[Compared, ...]:
    compared = []
    for method, bits in _COMPARED:
        other = full_fine_tuning(recipe) if method == "full" else _with(recipe, "base", bits=bits)
        if method == "lora" and recipe.adapter.method == "full":
            continue
        peak = worst(plan(other, config, facts).phases)
        compared.append(Compared(method, bits, peak.peak_bytes, peak.at_peak))
    return tuple(compared)


def _smaller(
    recipe: Recipe, config: Any, facts: DeviceFacts, peak_bytes: int
) -> tuple[Advice, ...]:
    """Single changes that save memory, each planned, the most saving first."""
    train, data, base = recipe.train, recipe.data, recipe.base
    changes: list[tuple[str, Recipe]] = []
    if not train.activation_checkpointing:
        changes.append(
            (
                "train.activation_checkpointing=true",
                _with(recipe, "train", activation_checkpointing=True),
            )
        )
    if train.micro_batch > 1:
        changes.append(("train.micro_batch=1", _with(recipe, "train", micro_batch=1)))
    if recipe.adapter.method == "lora" and base.bits > 4:
        changes.append(("base.bits=4", _with(recipe, "base", bits=4)))
    if data.seq_len >= 512:
        half = data.seq_len // 2
        changes.append((f"data.seq_len={half}", _with(recipe, "data", seq_len=half)))
    if train.optimizer == "adamw" and recipe.adapter.method == "lora":
        changes.append(("train.optimizer=adamw8bit", _with(recipe, "train", optimizer="adamw8bit")))
    planned = ((text, plan(changed, config, facts).peak_bytes) for text, changed in changes)
    advice = [Advice(text, peak_bytes - peak, peak) for text, peak in planned if peak < peak_bytes]
    return tuple(sorted(advice, key=lambda one: one.peak_bytes))


def _largest(recipe: Recipe, config: Any, facts: DeviceFacts) -> tuple[Advice, ...]:
    """The largest sequence at micro-batch 1, the largest micro-batch at the recipe's length."""
    now = plan(recipe, config, facts).peak_bytes
    limit = int(getattr(config, "max_position_embeddings", None) or 2**17)
    alone = _with(recipe, "train", micro_batch=1)
    found = []
    for text, make, top, unit in (
        ("data.seq_len", lambda n: _with(alone, "data", seq_len=n), limit, 64),
        ("train.micro_batch", lambda n: _with(recipe, "train", micro_batch=n), 256, 1),
    ):
        best = _bisect(
            lambda n, make=make: plan(make(n), config, facts).peak_bytes, top, unit, facts
        )
        if best is not None:
            value, peak = best
            found.append(Advice(f"{text}={value}", now - peak, peak))
    return tuple(found)


def _bisect(peak_of: Any, top: int, unit: int, facts: DeviceFacts) -> tuple[int, int] | None:
    """(largest multiple of `unit` up to `top` whose peak fits, that peak); None if none does."""
    low, high, best = 1, max(1, top // unit), None
    while low <= high:
        middle = (low + high) // 2
        peak = peak_of(middle * unit)
        if peak <= facts.capacity_bytes:
            best, low = (middle * unit, peak), middle + 1
        else:
            high = middle - 1
    return best


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update=changes)
    return recipe.model_copy(update={section: part})
