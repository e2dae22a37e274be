"""`qlora train` in a process that is not the main one: it trains, and writes no file of the run."""

from __future__ import annotations

from dataclasses import replace

from qlora_cli.errors import UsageError
from qlora_cli.events import Silent
from qlora_cli.jobs.memory import gather_memory
from qlora_cli.jobs.prepare import TrainingJob, prepare, read_job
from qlora_cli.jobs.process_start import JobStart, share_state
from qlora_cli.jobs.train import load, make_loop
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.instrument import Instrument
from qlora_cli.parallel.processes import Processes
from qlora_cli.train.energy import energy_counter
from qlora_cli.train.runtime import setup_device
from qlora_cli.train.stop_signals import endings_as_interrupt
from qlora_cli.train.trackers import Trackers


def run(processes: Processes) -> None:
    """Train together with the main process, which calls `train.run`, until it ends.

    The main process chooses every setting. Raises Interrupted if a process was asked to stop,
    ProcessLost if another process has ended, and the errors of loading and training.
    """
    with endings_as_interrupt():
        start = processes.broadcast(None)
        if start is None:
            return
        assert isinstance(start, JobStart)
        _train(_prepared(start, processes), start, processes)


def _prepared(start: JobStart, processes: Processes) -> TrainingJob:
    """Return the job of the main process. Raises UsageError if the rows here are others."""
    profile = replace(inspect_device(), count=processes.size)
    job = read_job(prepare(start.recipe, profile))
    if job.data_digest != start.data_digest:
        raise UsageError(
            f"process {processes.rank} has read other rows than the main process",
            where="data.train",
            hint="give all machines the same data files, base and versions",
        )
    return job


def _train(job: TrainingJob, start: JobStart, processes: Processes) -> None:
    prepared, observer = job.prepared, Silent()
    device = setup_device(prepared.profile, prepared.recipe.train.seed, processes)
    instrument = Instrument(device, prepared.profile)
    state = load(prepared, device, instrument, observer, processes=processes)
    if start.resumes:
        state.optimizer.load_state_dict({})  # The main process has the states.
    share_state(state, instrument)
    loop = make_loop(
        job,
        None,
        start,
        state,
        instrument,
        observer,
        Trackers(observer.note),
        energy_counter(device, processes=processes.size),
        lambda _: gather_memory(processes, instrument),
        "",
    )
    loop.train()
    loop.evaluator.evaluate_if_due(lambda: False)
    gather_memory(processes, instrument)
