"""Computes the constants of every row once, before the first step, and stores them in the run.

The constants of a preference pair are the log-probabilities of both answers under the reference
model. A resumed run reads them back, so it continues with the same values. The file belongs to the
rows and the base: if one of them has changed, it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_cli.data.collate import Batch, peak_batches
from qlora_cli.data.packing import BatchSchedule, peak_steps
from qlora_cli.errors import ModelError, NotFinite, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.atomic import atomic_file, report_write_errors
from qlora_cli.files.safetensors_io import TensorSpec, read_header, read_tensor, write_tensors
from qlora_cli.memory.instrument import Instrument
from qlora_cli.runs.layout import RunFolder
from qlora_cli.train.state import State

Values = NDArray[np.float32]
_KEY = "key"


@dataclass(frozen=True)
class _Constants:
    """The constants of all rows. Rows that are not computed yet have NaN.

    train: (rows of the schedule, k). held_out: (rows of all held-out batches, k).
    """

    train: Values
    held_out: Values


def add_constants(
    state: State,
    schedule: BatchSchedule,
    held_out: list[Batch],
    steps: int,
    run: RunFolder,
    key: str,
    instrument: Instrument,
    observer: Observer,
) -> list[Batch]:
    """Give the rows of `schedule` their constants and return `held_out` with theirs.

    Does nothing if the task needs none. Rows that no step of the job uses are not computed.
    steps: number of optimizer steps of the job. key: a hash of all rows and of the base.
    Raises ModelError if a resumed run's file is missing, damaged or of other rows, UsageError if a
    resumed run needs more rows and their constants cannot be computed any more, NotFinite if a
    value is not finite.
    """
    if not state.task.needs_constants:
        return held_out
    constants = None
    if state.processes.is_main and (state.step or run.constants.is_file()):
        constants = _stored(run, key)
    constants = state.processes.broadcast(constants)
    if constants is None:
        if state.step:
            raise _unusable(run, "the file is missing or belongs to other rows")
        constants = _empty(state, schedule, held_out)
    missing = [step for step in _epoch(schedule, steps) if _is_missing(constants, schedule, step)]
    if missing or np.isnan(constants.held_out).any():
        if state.step and state.task.constants_need_start:
            raise UsageError(
                "the run cannot be extended to rows that it has not used: their reference "
                "log-probabilities need the weights before the first step",
                where=str(run.path),
                hint="start a new run with output=...",
            )
        _compute(state, schedule, held_out, missing, constants, instrument, observer)
        if state.processes.is_main:
            _write(run, key, constants)
        constants = state.processes.broadcast(constants)
    schedule.set_constants(constants.train)
    return _with_constants(held_out, constants.held_out)


def _epoch(schedule: BatchSchedule, steps: int) -> range:
    """Return steps that use every row that the job uses: at most those of the first epoch."""
    return range(min(steps, schedule.steps_per_epoch))


def _is_missing(constants: _Constants, schedule: BatchSchedule, step: int) -> bool:
    rows = [row for batch in schedule.step_rows(step) for row in batch]
    return bool(np.isnan(constants.train[rows]).any())


def _empty(state: State, schedule: BatchSchedule, held_out: Sequence[Batch]) -> _Constants:
    width = len(state.task.segment_names)
    num_held_out = sum(len(batch.segments) // width for batch in held_out)
    train, other = (
        np.full((number, width), np.nan, np.float32) for number in (schedule.num_rows, num_held_out)
    )
    return _Constants(train, other)


def _compute(
    state: State,
    schedule: BatchSchedule,
    held_out: list[Batch],
    steps: Sequence[int],
    constants: _Constants,
    instrument: Instrument,
    observer: Observer,
) -> None:
    """Fill in the rows of `steps` and of `held_out`.

    The batches at which memory peaks are computed first with the memory tracker, as in evaluations.
    """
    instrument.release_cache()
    peaks = [held_out[index] for index in peak_batches([batch.size for batch in held_out])]
    for step in sorted(peak_steps(schedule, steps)):
        peaks += schedule.step_batches(step)
    with instrument.phase("eval"):
        for batch in peaks:
            state.task.constants(state.loaded, batch, state.device)
    number = sum(len(schedule.step_rows(step)) for step in steps) + len(held_out)
    observer.stage("reference", number)
    with instrument.count_only("eval"):
        done = 0
        for rows, batch in _numbered(schedule, steps):
            constants.train[rows] = _values(state, batch)
            observer.advance(done := done + 1)
        first = 0
        for batch in held_out:
            values = _values(state, batch)
            constants.held_out[first : first + len(values)] = values
            first += len(values)
            observer.advance(done := done + 1)
    instrument.release_cache()


def _numbered(schedule: BatchSchedule, steps: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
    """Yield the row numbers of each micro-batch of the steps, and the micro-batch."""
    for step in steps:
        yield from zip(schedule.step_rows(step), schedule.step_batches(step), strict=True)


def _values(state: State, batch: Batch) -> Values:
    """Return the constants of the rows of a batch. Raises NotFinite."""
    values = state.task.constants(state.loaded, batch, state.device).cpu()
    if not values.isfinite().all():
        raise NotFinite(
            "the reference model computes NaN or infinity for a row",
            hint="set base.compute_dtype=bfloat16 or float32, or check the base's files",
        )
    array: Values = values.numpy()
    return array


def _with_constants(batches: Sequence[Batch], values: Values) -> list[Batch]:
    """Return the batches with their constants. values: of all rows, in order."""
    result, first = [], 0
    for batch in batches:
        last = first + len(batch.segments) // values.shape[1]
        result.append(replace(batch, constants=torch.from_numpy(values[first:last])))
        first = last
    return result


def _stored(run: RunFolder, key: str) -> _Constants | None:
    """Return the constants in the run's folder; None if they are absent or of other rows.

    Raises ModelError if the file is damaged.
    """
    if not run.constants.is_file():
        return None
    try:
        entries, metadata = read_header(run.constants)
        if metadata.get(_KEY) != key:
            return None
        return _Constants(*(read_tensor(entries[n]).numpy() for n in ("train", "held_out")))
    except (ModelError, KeyError, OSError) as fault:
        raise _unusable(run, f"the file is damaged ({str(fault)[:200]})") from fault


def _unusable(run: RunFolder, reason: str) -> ModelError:
    return ModelError(
        f"the run's reference log-probabilities cannot be used: {reason}",
        where=str(run.constants),
        hint="restore the data files and this file, or start a new run with output=...",
    )


def _write(run: RunFolder, key: str, constants: _Constants) -> None:
    """Write the constants atomically. Raises QloraError if the disk is full."""
    tensors = {
        "train": torch.from_numpy(constants.train),
        "held_out": torch.from_numpy(constants.held_out),
    }
    specs = {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with (
        report_write_errors("the reference log-probabilities", run.constants),
        atomic_file(run.constants) as beside,
    ):
        write_tensors(beside, specs, tensors.__getitem__, {_KEY: key})
