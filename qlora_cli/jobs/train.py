"""`qlora train`: train a recipe's adapter and write it with the memory report."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

import torch

from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.data.collate import Batch
from qlora_cli.errors import Interrupted
from qlora_cli.events import Observer
from qlora_cli.jobs import record
from qlora_cli.jobs.initial_adapter import initial_factors_in, load_initial_adapter
from qlora_cli.jobs.measured_speed import record_speed
from qlora_cli.jobs.memory import EarlierProcess, MemoryRecord
from qlora_cli.jobs.out_of_memory import shortage_explained
from qlora_cli.jobs.planned_time import time_left
from qlora_cli.jobs.prepare import Prepared, TrainingJob
from qlora_cli.jobs.prepare_training import check_memory, prepare_training
from qlora_cli.jobs.process_start import JobStart, share_state, take_turns
from qlora_cli.jobs.results import TrainResult
from qlora_cli.jobs.run_lifecycle import (
    describe_extension,
    finished_result,
    open_or_resume,
    record_stop,
)
from qlora_cli.jobs.settled import may_recompute_more
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.ledger import Ledger
from qlora_cli.models.build import build
from qlora_cli.parallel.processes import SINGLE, Processes
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import mean_last_loss
from qlora_cli.runs.resume import add_last_checkpoint_hint, load_checkpoint
from qlora_cli.runs.run import Run
from qlora_cli.train.constants import add_constants
from qlora_cli.train.energy import EnergyCounter, energy_counter
from qlora_cli.train.evaluation import Evaluator
from qlora_cli.train.loop import LAST_LOSSES, TrainingLoop
from qlora_cli.train.progress import Progress
from qlora_cli.train.runtime import setup_device
from qlora_cli.train.shortage import divided_parts
from qlora_cli.train.state import BuildModel, State, build_state, tag_living
from qlora_cli.train.stop_signals import endings_as_interrupt
from qlora_cli.train.trackers import Trackers
from qlora_cli.train.trained_weights import copy_weights, weights_checksums, write_weights


def run(
    recipe: Recipe,
    *,
    recipe_path: Path | None,
    resume: bool,
    observer: Observer,
    allow: Collection[str] = (),
    build_model: BuildModel = build,
    processes: Processes = SINGLE,
) -> TrainResult:
    """Train the recipe and return the result of the run.

    recipe_path: the recipe's file, recorded in run.json. resume: continue the run in the recipe's
    output folder; a finished run returns its stored result. allow: codes of data findings that
    are neither shown nor stop a new run. build_model: as of `build_state`. processes: those that
    train the job; this is the main one, and the others call `follow.run`. Raises InputError if the
    recipe, the base or the data cannot be used, DoesNotFit if memory does not suffice, Interrupted
    after Ctrl-C, ProcessLost if another process has ended, QloraError if training diverges or a
    file cannot be written.
    """
    with RunFolder(Path(recipe.output)).locked(new=not resume), endings_as_interrupt():
        earlier = Run(Path(recipe.output)) if resume else None
        job, planned = prepare_training(recipe, observer, earlier, allow, processes.size)
        return _run(job, planned, recipe_path, earlier, observer, build_model, processes)


def _run(
    job: TrainingJob,
    planned: MemoryPlan,
    recipe_path: Path | None,
    earlier: Run | None,
    observer: Observer,
    build_model: BuildModel,
    processes: Processes,
) -> TrainResult:
    """Train a prepared job, in a run's folder that no other process uses.

    planned: the job's plan. earlier: the run to resume; None for a new one.
    """
    description = record.describe_run(job, recipe_path)
    if earlier is not None and (finished := finished_result(earlier, description, observer)):
        observer.note(f"{job.run.path} is finished; there is nothing to resume")
        processes.broadcast(None)
        return finished
    checkpoint = open_or_resume(job, description, earlier, observer)
    if earlier is not None and (extension := describe_extension(earlier, job)):
        observer.note(extension)
    try:
        baseline = check_memory(job, planned, observer)
        start = JobStart(
            job.prepared.recipe,
            job.data_digest,
            divided_parts(job.run),
            may_recompute_more(job.prepared),
            resumes=checkpoint is not None,
        )
        processes.broadcast(start)
        return _train(job, start, checkpoint, planned, baseline, observer, build_model, processes)
    except (Interrupted, KeyboardInterrupt):
        record_stop(job.run, "interrupted", earlier is not None)
        raise
    except BaseException:  # Any error: run.json must not keep the status `running`.
        record_stop(job.run, "failed", earlier is not None)
        raise


def _train(
    job: TrainingJob,
    start: JobStart,
    checkpoint: Path | None,
    planned: MemoryPlan,
    baseline: MemoryPlan,
    observer: Observer,
    build_model: BuildModel,
    processes: Processes,
) -> TrainResult:
    """Load the model, train from `checkpoint` or from the start, evaluate and save.

    planned, baseline: the plans of this job and of full fine-tuning. build_model: as of
    `build_state`. processes: those that train the job, of which this is the main one.
    """
    prepared = job.prepared
    device = setup_device(prepared.profile, prepared.recipe.train.seed, processes)
    instrument = Instrument(device, prepared.profile)
    if prepared.recipe.train.log_to:
        # A server that does not answer can take minutes.
        observer.note(f"starting {', '.join(prepared.recipe.train.log_to)}")
    with closing(Trackers.start(prepared.recipe, job.run, observer.note)) as trackers:
        given = (build_model, processes, initial_factors_in(checkpoint, prepared.recipe))
        state = load(prepared, device, instrument, observer, *given)
        record.set_status(job.run, "running", tensors=record.describe_tensors(state.loaded))
        earlier = _restore(job, checkpoint, state, observer)
        share_state(state, instrument)
        measured = (job, planned, baseline, instrument, earlier, processes)
        memory, energy = MemoryRecord(*measured), energy_counter(device, processes=processes.size)
        record.set_status(job.run, "running", energy=energy.source)
        key = f"{job.data_digest} {job.run.read()['base_fingerprint']}"
        shown = (observer, trackers, energy, memory.write)
        loop = make_loop(job, planned, start, state, instrument, *shown, key)
        with add_last_checkpoint_hint(job.run), shortage_explained(prepared, planned):
            progress = loop.train()
            # The last evaluation, if the process that trained the last step was stopped before it.
            loop.evaluator.evaluate_if_due(lambda: False)
            exported = _export(job, state, loop.evaluator, observer)
        ledger = memory.write(progress)
        trackers.log(_peaks(ledger), state.step)
    return _finish(job, state.step, progress, loop.evaluator, exported, ledger)


def make_loop(
    job: TrainingJob,
    planned: MemoryPlan | None,
    start: JobStart,
    state: State,
    instrument: Instrument,
    observer: Observer,
    trackers: Trackers,
    energy: EnergyCounter,
    on_checkpoint: Callable[[Progress], object],
    constants_key: str,
) -> TrainingLoop:
    """Return the loop of a job whose state is loaded. Computes the constants of its rows.

    planned: the plan of the job; None in a process that shows no progress.
    The last arguments are those of `TrainingLoop`, and the key of `add_constants`.
    """
    given = (job.run, constants_key, instrument, observer)
    held_out: list[Batch] = add_constants(state, job.schedule, job.held_out, job.steps, *given)
    evaluator = Evaluator(
        state, held_out, job.steps, job.eval_every, job.run, instrument, observer, trackers
    )
    shared = (state, job.schedule, job.steps, job.run, instrument, observer, evaluator)
    base = (job.prepared.folder, job.prepared.chat_template)
    changes = (start.may_recompute_more, start.parts)
    estimate = time_left(job, planned, state.step, start.parts)
    return TrainingLoop(*shared, *base, energy, on_checkpoint, estimate, *changes)


def _peaks(ledger: Ledger) -> dict[str, int]:
    """Return the planned and the measured peak memory, for trackers."""
    return {key: getattr(ledger, key) for key in ("planned_peak_bytes", "measured_peak_bytes")}


def _restore(
    job: TrainingJob, checkpoint: Path | None, state: State, observer: Observer
) -> EarlierProcess | None:
    """Restore a checkpoint into `state` and return what the earlier process measured.

    Without a checkpoint, reads the adapter that the recipe starts from and returns None.
    """
    if checkpoint is None:
        load_initial_adapter(job.prepared, state, observer)
        return None
    state.step, scale = load_checkpoint(checkpoint, state.trainable, state.optimizer)
    state.loss_scale.restore(scale)
    observer.note(f"resuming after step {state.step}")
    return EarlierProcess.of(job.run, state.step)


def load(
    prepared: Prepared,
    device: torch.device,
    instrument: Instrument,
    observer: Observer,
    build_model: BuildModel = build,
    processes: Processes = SINGLE,
    adapter: AdapterFile | None = None,
) -> State:
    """Build the job's state before its first step and measure the phase `load`.

    device: of the model. instrument: registers every tensor of the state. build_model: as of
    `build_state`, whose errors are raised. processes: those that train the job. The first one of a
    machine loads the base before the others if it keeps a packed copy, which they then use.
    adapter: as of `ModelRequest`.
    """
    with take_turns(processes, prepared), instrument.phase("load"):
        request = prepared.request(device, observer, processes, adapter)
        state = build_state(request, build_model)
        tag_living(state, instrument.tracker)
    instrument.release_cache()
    return state


def _export(job: TrainingJob, state: State, evaluator: Evaluator, observer: Observer) -> int:
    """Write the trained weights to the run's folder and return their step.

    With `train.keep_best` they are those of the evaluated step with the lowest held-out loss, which
    has a checkpoint, else those of the last step.
    """
    best = evaluator.best
    if best is None or not state.recipe.train.keep_best or best.step == state.step:
        _export_last(job, state)
        return state.step
    if not job.run.checkpoint(best.step).is_dir():
        observer.note(
            f"warning: the checkpoint of step {best.step:,}, which has the best evaluation, "
            "is gone; the exported weights are those of the last step"
        )
        _export_last(job, state)
        return state.step
    copy_weights(job.run.checkpoint(best.step), job.run.path)
    observer.note(
        f"the exported weights are those of step {best.step:,}, which has {evaluator.best_text}; "
        f"those of the last step are in its checkpoint ({job.run.checkpoint(state.step)})"
    )
    return best.step


def _export_last(job: TrainingJob, state: State) -> None:
    """Write the trained weights of the last step, which has a checkpoint, to the run's folder."""
    if state.division.sharded is not None:  # This process has only a part of them.
        copy_weights(job.run.checkpoint(state.step), job.run.path)
        return
    write_weights(state, job.prepared.folder, job.run.path, job.prepared.chat_template)


def _finish(
    job: TrainingJob,
    steps: int,
    progress: Progress,
    evaluator: Evaluator,
    exported: int,
    ledger: Ledger,
) -> TrainResult:
    """Return the result, and store it in run.json with the status `done`.

    steps: number of optimizer steps done. exported: the step whose weights were exported.
    """
    losses = {evaluation.step: evaluation.loss for evaluation in evaluator.done}
    result = TrainResult(
        run=job.run.path,
        steps=steps,
        train_loss=mean_last_loss(job.run.metrics, LAST_LOSSES),
        eval_loss=losses.get(exported),
        tokens_per_second=progress.tokens_per_second,
        ledger=ledger,
        best_step=exported if exported in losses else None,
        eval_loss_before=losses.get(0),
        metrics=evaluator.metrics_of(exported),
    )
    summary = {key: value for key, value in result.to_dict().items() if key != "ledger"}
    record.set_status(job.run, "done", result=summary, checksums=weights_checksums(job.run))
    prepared = job.prepared
    record_speed(prepared.recipe, prepared.config, prepared.profile, result.tokens_per_second)
    return result
