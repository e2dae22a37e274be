"""`qlora train`: the job, from a recipe to an adapter and a ledger."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.collate import Batch, peak_batches
from qlora_cli.errors import DoesNotFit, Interrupted, QloraError, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.atomic import RESUME_HINT, atomic_file, atomic_folder, report_write_errors
from qlora_cli.files.source import WEIGHTS_FILE
from qlora_cli.jobs import record, report
from qlora_cli.jobs.memory import Earlier, MemoryRecord
from qlora_cli.jobs.prepare import Prepared, TrainingJob, prepare, read_job
from qlora_cli.jobs.results import TrainResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.ledger import Ledger
from qlora_cli.models.attach import save_adapter
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.methods import full_fine_tuning
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.finite import add_last_checkpoint_hint
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.resume import load_checkpoint, write_trained
from qlora_cli.runs.run import Run
from qlora_cli.tasks.task import EvalScore
from qlora_cli.train.loop import LAST_LOSSES, Progress, TrainingLoop
from qlora_cli.train.runtime import setup_device
from qlora_cli.train.state import State, build_state, tag_living
from qlora_cli.units import format_bytes


def run(
    recipe: Recipe, *, recipe_path: Path | None, resume: bool, observer: Observer
) -> TrainResult:
    """Trains. Raises InputError for what the user wrote, DoesNotFit, Interrupted, QloraError."""
    facts = inspect_device()
    prepared = prepare(recipe, facts)
    for choice in prepared.choices:
        observer.note(f"{choice.key} = {choice.value}: {choice.reason}")
    job = read_job(prepared)
    about = record.describe_run(prepared, recipe_path, job.steps)
    earlier = Run(job.run.path) if resume else None
    if earlier is not None and (finished := _finished(earlier, about)) is not None:
        observer.note(f"{job.run.path} is finished; there is nothing to go on with")
        return finished
    checkpoint = open_or_resume(job, about, earlier)
    try:
        planned, before = _plan(job, observer)
        return _train(job, checkpoint, planned, before, observer)
    except torch.OutOfMemoryError as fault:
        record_stop(job.run, "failed", resume)
        raise DoesNotFit(
            f"the card's memory is full: {str(fault).splitlines()[0]}",
            hint="`qlora plan` with --fit says what fits; is another process on the card?",
        ) from fault
    except (Interrupted, KeyboardInterrupt):
        record_stop(job.run, "interrupted", resume)
        raise
    except BaseException:  # whatever it is, run.json must not go on saying running
        record_stop(job.run, "failed", resume)
        raise


def record_stop(run: RunFolder, status: str, resumed: bool) -> None:
    """After an error: the status; or nothing at all, where a new run has not done a step."""
    done_nothing = not run.steps() and not (run.metrics.exists() and run.metrics.stat().st_size)
    # The error on its way says more than that run.json could not be written, either.
    with suppress(OSError, QloraError):
        if done_nothing and not resumed:
            run.discard()
        else:
            record.set_status(run, status)


def _finished(earlier: Run, about: dict[str, Any]) -> TrainResult | None:
    """What a finished run said at its end; None where there is something left to do."""
    if earlier.require("status") != "done" or not earlier.folder.memory_json.is_file():
        return None
    _check_same(earlier, about)
    ledger = report.ledger_of(earlier)
    return TrainResult(**earlier.require("result") | {"run": earlier.path, "ledger": ledger})


def open_or_resume(job: TrainingJob, about: dict[str, Any], earlier: Run | None) -> Path | None:
    """Makes the run's folder, or finds the checkpoint to go on from."""
    if earlier is None:
        job.run.create()
        job.run.write(about)
        return None
    _check_same(earlier, about)
    job.run.write(earlier.record | about)
    steps = job.run.steps()
    _forget_metrics_after(job.run, steps[-1] if steps else 0)
    return job.run.checkpoint(steps[-1]) if steps else None


def _check_same(earlier: Run, now: dict[str, Any]) -> None:
    """A run goes on as it began; another recipe is another run."""
    earlier.check_fingerprint(now["base_fingerprint"])
    # A run of an older version told of its files as they were named.
    old, new = _flat(record.from_anywhere(earlier.require("recipe"))), _flat(now["recipe"])
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise UsageError(
            "the recipe has changed since this run began: "
            + ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed),
            where=str(earlier.folder.run_json),
            hint="go on with the old values, or start a new run with output=...",
        )


def _flat(recipe: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(recipe, dict):
        return {prefix.rstrip("."): recipe}
    return {k: v for key in recipe for k, v in _flat(recipe[key], f"{prefix}{key}.").items()}


def _forget_metrics_after(run: RunFolder, step: int) -> None:
    """Lines of steps that will be done again; each line is one step."""
    if run.metrics.exists():
        lines = run.metrics.read_text().splitlines(keepends=True)[:step]
        with report_write_errors("metrics.jsonl", run.metrics), atomic_file(run.metrics) as beside:
            beside.write_text("".join(lines))


def _plan(job: TrainingJob, observer: Observer) -> tuple[MemoryPlan, MemoryPlan]:
    """(this job, full fine-tuning on the same batches). Raises DoesNotFit."""
    prepared, window, held_out = job.prepared, job.largest_step_batches, job.largest_eval_batches
    planned, before = (
        dry_run(recipe, prepared.config, prepared.profile, window, held_out)
        for recipe in (prepared.recipe, full_fine_tuning(prepared.recipe))
    )
    observer.note(
        f"plan: {format_bytes(planned.peak_bytes)} at the peak; full fine-tuning would need "
        f"{format_bytes(before.peak_bytes)}"
    )
    if not planned.fits(prepared.profile.usable_bytes):
        raise DoesNotFit(
            f"the job needs {format_bytes(planned.reserved_bytes or planned.peak_bytes)}; "
            f"{prepared.profile.name} has {format_bytes(prepared.profile.usable_bytes)} for it",
            hint="`qlora plan` says which changes make it fit",
        )
    return planned, before


def _train(
    job: TrainingJob,
    checkpoint: Path | None,
    planned: MemoryPlan,
    before: MemoryPlan,
    observer: Observer,
) -> TrainResult:
    prepared = job.prepared
    device = setup_device(prepared.profile, prepared.recipe.train.seed)
    instrument = Instrument(device, prepared.profile)
    state = load(prepared, device, instrument, observer)
    record.set_status(job.run, "running", tensors=record.describe_tensors(state.loaded))
    earlier = None
    if checkpoint is not None:
        state.step, scale = load_checkpoint(checkpoint, state.trainable, state.optimizer)
        state.loss_scale.restore(scale)
        earlier = Earlier.of(job.run, state.step)
        observer.note(f"going on after step {state.step}")
    memory = MemoryRecord(job, planned, before, instrument, earlier)
    loop = TrainingLoop(state, job.schedule, job.steps, job.run, instrument, observer, memory.write)
    with add_last_checkpoint_hint(job.run):
        progress = loop.train()
        score = _evaluate(state, job.held_out, instrument)
        _save(job, state)
    ledger = memory.write(progress)
    return _finish(job, progress, score, ledger)


def load(
    prepared: Prepared, device: torch.device, instrument: Instrument, observer: Observer
) -> State:
    """The state before its first step, seen by the instrument. Raises as `build_state`."""
    with instrument.phase("load"):
        state = build_state(prepared.request(device, observer))
        tag_living(state, instrument.tracker)
    instrument.release_cache()
    return state


def _evaluate(state: State, held_out: Sequence[Batch], instrument: Instrument) -> EvalScore | None:
    if not held_out:
        return None
    worst = [
        held_out[number] for number in sorted(peak_batches([batch.size for batch in held_out]))
    ]
    with instrument.phase("eval"):
        state.task.evaluate(state.loaded, worst, state.device)
    with instrument.count_only("eval"):
        return state.task.evaluate(state.loaded, held_out, state.device)


def _save(job: TrainingJob, state: State) -> None:
    if job.prepared.recipe.adapter.method == "lora":
        save_adapter(state.loaded, job.prepared.recipe, job.run.adapter)
        return
    weights = job.run.weights
    with (
        report_write_errors("the trained model", weights, hint=RESUME_HINT),
        atomic_folder(weights) as folder,
    ):
        shutil.copy(job.prepared.folder / "config.json", folder)
        write_trained(state.trainable, folder / WEIGHTS_FILE)


def _train_loss(run: RunFolder) -> float:
    """Mean loss of the last steps, also of those that an earlier process did."""
    lines = run.metrics.read_text().splitlines()[-LAST_LOSSES:]
    losses: list[float] = [json.loads(line)["loss"] for line in lines]
    return sum(losses) / len(losses)


def _finish(
    job: TrainingJob, progress: Progress, score: EvalScore | None, ledger: Ledger
) -> TrainResult:
    result = TrainResult(
        run=job.run.path,
        steps=job.steps,
        train_loss=_train_loss(job.run),
        eval_loss=score.loss if score else None,
        tokens_per_second=progress.tokens_per_second,
        ledger=ledger,
    )
    summary = {key: value for key, value in result.to_dict().items() if key != "ledger"}
    record.set_status(job.run, "done", result=summary)
    return result
