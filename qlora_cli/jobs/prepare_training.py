"""Prepares a training job: everything that is checked, chosen and planned before loading."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from qlora_cli.errors import DoesNotFit
from qlora_cli.events import Observer
from qlora_cli.jobs.auto_bits import choose_bits
from qlora_cli.jobs.importance import choose_importance
from qlora_cli.jobs.initial_adapter import check_initial_adapter
from qlora_cli.jobs.prepare import TrainingJob, prepare, read_job
from qlora_cli.jobs.process_start import check_processes
from qlora_cli.jobs.settled import choose_micro_batch, choose_policy, with_stored_settings
from qlora_cli.jobs.training_length import TrainingLength
from qlora_cli.memory.device import inspect_device
from qlora_cli.models.limits import limits_of
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.proof.prove import require_proof
from qlora_cli.recipe.methods import full_fine_tuning
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from qlora_cli.tasks.registry import task_of
from qlora_cli.train.trackers import check_trackers
from qlora_cli.units import format_bytes


def prepare_training(
    recipe: Recipe,
    observer: Observer,
    earlier: Run | None,
    allow: Collection[str],
    processes: int = 1,
) -> tuple[TrainingJob, MemoryPlan]:
    """Check everything that needs no weights, read the data, choose what depends on memory.

    Returns the job and its plan; choices and length are reported. earlier: the run to resume.
    allow: as of `read_job`; the rows of a resumed run are those that were checked when it began.
    processes: number of processes that train the job. Raises UsageError if it needs another number.
    """
    check_processes(recipe, processes)
    prepared = prepare(recipe, replace(inspect_device(), count=processes))
    task = task_of(prepared.recipe)
    prepared = replace(prepared, proof=require_proof(prepared.config, task, observer))
    for limit in limits_of(prepared.config, task.model_class):
        observer.note(limit)
    check_trackers(prepared.recipe)
    check_initial_adapter(prepared)
    _report(prepared.choices, observer)
    run = RunFolder(Path(prepared.recipe.output))
    prepared, choices = choose_importance(prepared, run, earlier, observer)
    _report(choices, observer)
    prepared, choices = choose_bits(prepared, earlier, observer)
    _report(choices, observer)
    if earlier is not None:
        prepared = with_stored_settings(prepared, earlier)
    prepared, choices = choose_micro_batch(prepared)
    _report(choices, observer)
    job = read_job(prepared, observer, allow if earlier is None else None)
    length = TrainingLength.of(prepared.recipe, job.schedule, job.steps)
    observer.note(length.text())
    if warning := length.warning():
        observer.note(warning)
    job, planned, choices = choose_policy(job)
    _report(choices, observer)
    return job, planned


def _report(choices: Iterable[Choice], observer: Observer) -> None:
    for choice in choices:
        observer.note(choice.text)


def check_memory(job: TrainingJob, planned: MemoryPlan, observer: Observer) -> MemoryPlan:
    """Return the plan of full fine-tuning on the same batches, and report both plans.

    planned: the job's plan. Raises DoesNotFit if the job does not fit on the device.
    """
    prepared, profile = job.prepared, job.prepared.profile
    baseline = dry_run(
        full_fine_tuning(prepared.recipe),
        prepared.config,
        profile,
        job.largest_step_batches,
        job.largest_eval_batches,
    )
    observer.note(
        f"planned peak memory: {format_bytes(planned.peak_bytes)}; full fine-tuning would need "
        f"{format_bytes(baseline.peak_bytes)}"
    )
    if not planned.fits(profile.usable_bytes):
        raise DoesNotFit(
            f"the job needs {format_bytes(planned.needed_bytes)}; "
            f"{profile.name} has {format_bytes(profile.usable_bytes)} for it",
            hint="`qlora plan` shows which changes make it fit",
        )
    return baseline
