"""`qlora plan`: what a job will need, before anything is loaded."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from qlora_cli.data.collate import largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import Problem, RecipeError
from qlora_cli.files.locate import find_config, read_config
from qlora_cli.jobs.results import Compared, PlanResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.ledger import Allocator, Device, Ledger, peak_phase
from qlora_cli.plan.advise import Planned, changes_that_fit, largest
from qlora_cli.plan.arithmetic import arithmetic_of
from qlora_cli.plan.dry_run import dry_run, method_peak
from qlora_cli.plan.merging import dry_run_merge
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.methods import full_fine_tuning
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.bitsandbytes_adamw import PAGED_FROM
from qlora_cli.train.optimizer import OPTIMIZERS
from qlora_cli.units import format_bytes

_MOST_TOKENS = 2**24
_COMPARED = (("full", 16), ("lora", 16), ("lora", 8), ("lora", 4))


def run(
    recipe: Recipe, *, device_profile: DeviceProfile | None, fit: bool, compare: bool
) -> PlanResult:
    """Plans the recipe for a device; this machine's where none is given.

    fit: advise the largest micro-batch and sequence that fit. compare: plan full fine-tuning and
    LoRA on 16, 8 and 4 bit too. Raises ModelError, RecipeError.
    """
    began = time.perf_counter()
    facts = device_profile or inspect_device()
    config = read_config(find_config(recipe.model.name, recipe.model.revision))
    resolved, _ = resolve(recipe, facts)
    planned: Planned = _Remembering(config, facts)
    imagined = planned(resolved)
    fits = imagined.fits(facts.usable_bytes)
    advice = largest(resolved, config, planned, facts) if fit else ()
    if not fits:
        told = {one.change for one in advice}
        more = changes_that_fit(resolved, planned, facts)
        advice += tuple(one for one in more if one.change not in told)
    ledger = planned_ledger(resolved, facts, imagined, planned(full_fine_tuning(resolved)))
    merging = dry_run_merge(resolved, config, facts)
    return PlanResult(
        device=facts.to_dict(),
        ledger=replace(ledger, phases=(*ledger.phases, merging)),
        fits=fits,
        usable_bytes=facts.usable_bytes,
        floor_bytes=imagined.floor_bytes,
        advice=advice,
        compare=_compare(resolved, planned) if compare else (),
        trainable_parameters=imagined.trainable_parameters,
        total_parameters=imagined.total_parameters,
        adapter_bytes=imagined.adapter_bytes,
        arithmetic=arithmetic_of(resolved, imagined),
        notes=_notes(resolved, facts, imagined),
        seconds=time.perf_counter() - began,
    )


def plan(recipe: Recipe, config: Any, facts: DeviceProfile) -> MemoryPlan:
    """Imagines a resolved recipe on the largest batches that it allows, whatever its rows are.

    Raises RecipeError where these are beyond any device.
    """
    tokens = recipe.data.seq_len * recipe.train.micro_batch
    if tokens > _MOST_TOKENS:
        raise RecipeError(
            "no device computes such a batch",
            [
                Problem(
                    "data.seq_len",
                    f"times train.micro_batch it is {tokens:,} tokens at once; "
                    f"{_MOST_TOKENS:,} are the most that are planned",
                )
            ],
        )
    worst_one = largest_batch(recipe.data.seq_len, recipe.train.micro_batch, config.vocab_size)
    return dry_run(
        recipe, config, facts, [worst_one] * min(2, recipe.train.grad_accum), [worst_one]
    )


def planned_ledger(
    recipe: Recipe, facts: DeviceProfile, imagined: MemoryPlan, before: MemoryPlan
) -> Ledger:
    """The plan as a ledger, nothing of it measured."""
    reserved = imagined.reserved_bytes
    return Ledger(
        device=Device(facts.kind, facts.name, facts.capacity_bytes),
        phases=imagined.phases,
        before=method_peak(full_fine_tuning(recipe), before.phases, "planned"),
        after=method_peak(recipe, imagined.phases, "planned"),
        planned_peak_bytes=imagined.peak_bytes,
        measured_peak_bytes=0,
        allocator=Allocator(imagined.peak_bytes, reserved) if reserved else Allocator(),
        instrument="planned: the same job on imagined tensors",
        floor_bytes=imagined.floor_bytes,
    )


class _Remembering:
    """Plans each recipe once."""

    def __init__(self, config: Any, facts: DeviceProfile) -> None:
        self._config = config
        self._facts = facts
        self._known: dict[str, MemoryPlan] = {}

    def __call__(self, recipe: Recipe) -> MemoryPlan:
        key = recipe.model_dump_json()
        if key not in self._known:
            self._known[key] = plan(recipe, self._config, self._facts)
        return self._known[key]


def _compare(recipe: Recipe, planned: Planned) -> tuple[Compared, ...]:
    compared: list[Compared] = []
    for method, bits in _COMPARED:
        if method == "full":
            other = full_fine_tuning(recipe)
        elif recipe.adapter.method == "full":
            continue
        else:
            other = recipe.model_copy(
                update={"base": recipe.base.model_copy(update={"bits": bits})}
            )
        peak = peak_phase(planned(other).phases)
        full_bytes = compared[0].peak_bytes if compared else peak.peak_bytes
        ratio = full_bytes / peak.peak_bytes
        compared.append(Compared(method, bits, peak.peak_bytes, peak.at_peak, ratio))
    return tuple(compared)


def _notes(recipe: Recipe, facts: DeviceProfile, imagined: MemoryPlan) -> tuple[str, ...]:
    """What of the plan is a model or a bound, and what is out of reach; one sentence each."""
    notes = []
    if imagined.frozen_bytes > facts.usable_bytes:
        notes.append(
            f"the frozen weights alone take {format_bytes(imagined.frozen_bytes)} of "
            f"{format_bytes(facts.usable_bytes)}: no change to batch, adapter or optimizer makes "
            "this job fit; take a smaller base, fewer bits or a larger card"
        )
    if facts.kind == "cuda":
        notes.append(
            "allocated and reserved are modelled: torch's caching allocator, cuBLAS' workspaces "
            "and the attention kernel of compute capability "
            + ".".join(map(str, facts.capability or ()))
        )
        source = "assumed" if facts.is_planned else "measured"
        notes.append(
            f"{format_bytes(facts.context_bytes)} of the card are taken by the CUDA context and "
            f"whatever else is there ({source}); the allocator has the rest"
        )
        if recipe.data.packing:
            notes.append(
                "each packed sequence is planned as one row; attention takes a little more for "
                "many short ones, and `qlora train` plans again with the rows' own lengths"
            )
    if OPTIMIZERS[recipe.train.optimizer].is_paged:
        notes.append(
            f"optimizer states of {PAGED_FROM:,} values and more are not counted: card and host "
            "share their memory, and the driver moves them away when the card is short"
        )
    if recipe.base.bits == 8 and recipe.base.outlier_threshold:
        notes.append(
            "8 bit: how many outlier columns there are depends on the data; the plan takes the "
            "most that are multiplied apart, an eighth of a layer's inputs"
        )
    return tuple(notes)
