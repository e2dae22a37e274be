"""`qlora plan`: the memory that a job needs, before anything is loaded."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.mixture import sources_of
from qlora_cli.data.positions import check_seq_len, row_limit
from qlora_cli.data.sources import open_sources
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import InputError
from qlora_cli.events import Observer, Silent
from qlora_cli.files.locate import find_config, read_config
from qlora_cli.files.paths import user_path
from qlora_cli.files.source import check_index
from qlora_cli.jobs.auto_bits import choose_bits
from qlora_cli.jobs.device_speed import device_speed
from qlora_cli.jobs.importance import check_scales
from qlora_cli.jobs.labels import resolve_labels
from qlora_cli.jobs.padding import planned_padding
from qlora_cli.jobs.planned_length import estimated_time, planned_length
from qlora_cli.jobs.prepare import prepare
from qlora_cli.jobs.process_start import check_processes
from qlora_cli.jobs.results import PlanResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.ledger import Allocator, Device, Ledger, peak_phase
from qlora_cli.models.limits import limits_of
from qlora_cli.models.packed_base import has_packed_copy
from qlora_cli.plan.advise import changes_that_fit, largest_sizes
from qlora_cli.plan.arithmetic import arithmetic_of
from qlora_cli.plan.dry_run import method_peak
from qlora_cli.plan.merging import dry_run_merge
from qlora_cli.plan.notes import plan_notes
from qlora_cli.plan.planner import Planner
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.results import Advice, Chosen, Compared, DiskNeeds, PolicySummary
from qlora_cli.plan.speeds import assumed_speed
from qlora_cli.plan.step_time import DeviceSpeed
from qlora_cli.proof.prove import require_proof
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.methods import full_fine_tuning
from qlora_cli.recipe.resolve import Choice, resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of

_SILENT = Silent()
_COMPARED = (("full", 16), ("lora", 16), ("lora", 8), ("lora", 4))
"""(method, bits) of the rows of `--compare`."""


def run(
    recipe: Recipe,
    *,
    device_profile: DeviceProfile | None,
    fit: bool,
    compare: bool,
    observer: Observer = _SILENT,
) -> PlanResult:
    """Plan a recipe's memory for a device.

    device_profile: the target device; None for the device of this machine. fit: also search the
    largest micro-batch and sequence length that fit. compare: also plan full fine-tuning and LoRA
    on 16, 8 and 4 bit. observer: receives the progress of `base.bits: auto`, which reads the
    weights and the rows. Raises ModelError or RecipeError, and UsageError if the recipe needs
    another number of devices.
    """
    began = time.perf_counter()
    profile = device_profile or inspect_device()
    config_file = find_config(recipe.model.name, recipe.model.revision)
    config = read_config(config_file)
    if user_path(recipe.model.name).is_dir():  # Files of the hub may be downloaded later.
        check_index(config_file.parent)
    recipe, chosen = resolve_labels(recipe, config, needs_rows=False)
    check_seq_len(recipe.data, config, recipe.adapter.prefix)
    check_scales(recipe, config)
    task = task_of(recipe)
    require_proof(config, task, Silent())
    check_processes(recipe, profile.count)
    resolved, _ = resolve(recipe, profile)
    resolved, bits = _with_bits(resolved, profile, observer)
    has_copy = partial(_has_copy, config_file.parent, config, profile)
    speed_of = partial(_speed, profile)
    planner = Planner(config, profile, has_copy=has_copy, speed_of=speed_of)
    settled = planner.settle(resolved)
    plan, flexible = settled.plan, _with_settled_batch(resolved, settled.recipe)
    resolved = settled.recipe
    baseline = planner.plan(full_fine_tuning(resolved))
    ledger = _ledger(resolved, profile, plan, baseline)
    merge_phase = dry_run_merge(resolved, config, profile)
    data_problem = _data_problem(recipe)
    length, unknown = (None, None) if data_problem else planned_length(resolved)
    return PlanResult(
        device=profile.to_dict(),
        ledger=replace(ledger, phases=(*ledger.phases, merge_phase)),
        fits=planner.fits(plan),
        usable_bytes=profile.usable_bytes,
        floor_bytes=plan.floor_bytes,
        advice=_advice(flexible, planner, fit),
        compare=_compare(resolved, planner) if compare else (),
        trainable_parameters=plan.trainable_parameters,
        total_parameters=plan.total_parameters,
        adapter_bytes=plan.adapter_bytes,
        arithmetic=arithmetic_of(resolved, plan),
        notes=(
            *(choice.text for choice in (*chosen, *bits)),
            *plan_notes(resolved, profile, plan),
            *limits_of(config, task.model_class),
            *filter(None, [None if data_problem else planned_padding(resolved, config)]),
        ),
        seconds=time.perf_counter() - began,
        steps=length.updates if length else recipe.train.steps,
        length=length,
        length_problem=unknown,
        time=estimated_time(resolved, config, profile, plan, length),
        disk=_disk_needs(resolved, plan),
        data_problem=data_problem,
        row_limit=row_limit(recipe.data, config),
        choices=tuple(Chosen(c.key, c.value, c.reason) for c in settled.choices),
        activation_policy=PolicySummary(
            plan.num_blocks,
            plan.num_recomputed,
            plan.flops.recomputed_share,
            plan.moved_inputs * resolved.train.grad_accum,
            _copied_weights(resolved, plan),
        ),
    )


def _with_bits(
    recipe: Recipe, profile: DeviceProfile, observer: Observer
) -> tuple[Recipe, tuple[Choice, ...]]:
    """Return a resolved recipe without `base.bits: auto`, and the choices made."""
    if recipe.base.bits != "auto":
        return recipe, ()
    prepared, choices = choose_bits(prepare(recipe, profile), None, observer)
    return prepared.recipe, choices


def _has_copy(folder: Path, config: Any, profile: DeviceProfile, recipe: Recipe) -> bool:
    """Return whether a job would load the base in `folder` from its packed copy."""
    return has_packed_copy(recipe, folder, config, task_of(recipe).model_class, profile.kind)


def _copied_weights(recipe: Recipe, plan: MemoryPlan) -> int:
    """Return the weights that a step copies from host memory; shards come from other processes."""
    return 0 if recipe.base.residency == SHARD else plan.copied_weights * recipe.train.grad_accum


def _speed(profile: DeviceProfile, compute: torch.dtype) -> DeviceSpeed:
    """Return the speed of a device, of which only ratios are of use if it is not known."""
    return device_speed(profile, compute) or assumed_speed(profile)


def _with_settled_batch(recipe: Recipe, settled: Recipe) -> Recipe:
    """Return the recipe with the chosen micro-batch; the policy stays `auto` if it was."""
    train = settled.train
    changes = {"micro_batch": train.micro_batch, "grad_accum": train.grad_accum}
    return with_settings(recipe, "train", **changes)


def _disk_needs(recipe: Recipe, plan: MemoryPlan) -> DiskNeeds:
    """Return the size of the files that the job and a merge write."""
    state_bytes = 1 if "8bit" in recipe.train.optimizer else 4
    checkpoint = plan.adapter_bytes + 2 * state_bytes * plan.trainable_parameters
    kept = recipe.train.keep_checkpoints
    checkpoints = kept if kept is not None else 1
    if recipe.data.eval is not None and recipe.train.keep_best:
        checkpoints += 1
    run = plan.adapter_bytes + checkpoints * checkpoint
    return DiskNeeds(checkpoint, run, 2 * plan.total_parameters)


def _data_problem(recipe: Recipe) -> str | None:
    """Return why the data cannot be read: a missing file, or None. No row is read."""
    held_out = recipe.data.eval
    settings = {"data.train": recipe.data.train}
    if held_out is not None and not isinstance(held_out, float):
        settings["data.eval"] = held_out
    for key, setting in settings.items():
        try:
            open_sources([source.path for source in sources_of(setting)])
        except InputError as error:
            hint = f" ({error.hint})" if error.hint else ""
            return f"{key}: {error.what}{hint}"
    return None


def _advice(recipe: Recipe, planner: Planner, fit: bool) -> tuple[Advice, ...]:
    """Return the largest sizes if `fit`, and changes that save memory if the job does not fit.

    recipe: resolved; its policy and its chunk of the loss may be `auto`, and then every change is
    planned with its own.
    """
    advice = largest_sizes(recipe, planner) if fit else ()
    if planner.fits(planner.plan(recipe)):
        return advice
    present = {item.change for item in advice}
    changes = changes_that_fit(recipe, planner)
    return advice + tuple(item for item in changes if item.change not in present)


def _ledger(
    recipe: Recipe, profile: DeviceProfile, plan: MemoryPlan, baseline: MemoryPlan
) -> Ledger:
    """Return a plan as a ledger. baseline: plan of full fine-tuning on the same batches."""
    reserved = plan.reserved_bytes
    return Ledger(
        device=Device(profile.kind, profile.name, profile.capacity_bytes),
        phases=plan.phases,
        before=method_peak(full_fine_tuning(recipe), baseline.phases, "planned"),
        after=method_peak(recipe, plan.phases, "planned"),
        planned_peak_bytes=plan.peak_bytes,
        measured_peak_bytes=0,
        allocator=Allocator(plan.peak_bytes, reserved) if reserved else Allocator(),
        instrument="planned: a dry run of the job on meta tensors",
        floor_bytes=plan.floor_bytes,
    )


def _compare(recipe: Recipe, planner: Planner) -> tuple[Compared, ...]:
    """Plan the methods of `_COMPARED` on the same batches; full fine-tuning is the first row.

    The recipe's own adapter method, such as DoRA, is in the place of LoRA. A mixed base of the
    recipe is the last row.
    """
    rows: list[Compared] = []
    mixed = [("lora", None)] if recipe.base.overrides else []
    for method, bits in [*_COMPARED, *mixed]:
        if method == "full":
            variant = full_fine_tuning(recipe)
        elif recipe.adapter.method == "full":
            continue
        elif bits is None:
            variant = recipe
        else:
            variant = with_settings(recipe, "base", bits=bits, overrides={})
        peak = peak_phase(planner.plan(variant).phases)
        full_bytes = rows[0].peak_bytes if rows else peak.peak_bytes
        ratio = full_bytes / peak.peak_bytes
        rows.append(Compared(variant.adapter.method, bits, peak.peak_bytes, peak.at_peak, ratio))
    return tuple(rows)
