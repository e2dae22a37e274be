"""Estimates how long training still takes, from what it has done so far.

Counted are the steps that are left with their micro-batches and tokens, the evaluations and the
checkpoints. The estimate begins with the plan and follows what is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.collate import BatchSize, peak_batches
from qlora_cli.data.packing import BatchSchedule
from qlora_cli.train.step_time_fit import PlannedTime, StepTimeFit, StepWork

_CHECKPOINT_SECONDS = 0.2
_CHECKPOINT_BYTES_PER_SECOND = 300e6
"""Assumed time of a checkpoint and speed of writing it, until one was written."""


@dataclass(frozen=True)
class Interruptions:
    """What training does between its steps.

    steps: number of optimizer steps of the job. eval_batches: of one evaluation; empty without.
    eval_every, checkpoint_every: steps between two; None for after the last step only. keeps_best:
    each best evaluation has a checkpoint of its own. checkpoint_bytes: size of a checkpoint.
    """

    steps: int
    eval_batches: tuple[BatchSize, ...]
    eval_every: int | None
    checkpoint_every: int
    keeps_best: bool
    checkpoint_bytes: int

    def evaluations_from(self, step: int) -> int:
        """Return the number of evaluations after the steps `step` to the last."""
        return _due_from(step, self.steps, self.eval_every) if self.eval_batches else 0

    def checkpoints_from(self, step: int) -> int:
        """Return the number of checkpoints after the steps `step` to the last."""
        return _due_from(step, self.steps, self.checkpoint_every)

    def best_only_from(self, step: int) -> int:
        """Return how many evaluations have a checkpoint only if they are best."""
        if not self.keeps_best or not self.eval_every or not self.eval_batches:
            return 0
        both = math.lcm(self.eval_every, self.checkpoint_every)
        # The last step always has a checkpoint, so that it is in neither number.
        last = self.steps - 1
        return _multiples(step, last, self.eval_every) - _multiples(step, last, both)


class WorkLeft:
    """The work of the steps of a schedule. tracked: steps with the memory tracker."""

    def __init__(self, schedule: BatchSchedule, steps: int, tracked: Collection[int]) -> None:
        self._schedule = schedule
        self._steps = steps
        self.tracked = frozenset(tracked)
        self._epoch = -1
        self._sums = np.zeros((1, 3))

    def of(self, step: int, parts: int = 1) -> StepWork:
        """Return the work of one step. parts: number of parts of each micro-batch."""
        before, after = self._sum_before(step), self._sum_before(step, 1)
        return self._work(after - before, 1, int(step in self.tracked), parts)

    def after(self, step: int, parts: int = 1) -> StepWork:
        """Return the work of all steps after the first `step` ones."""
        if step >= self._steps:
            return StepWork()
        per_epoch = self._schedule.steps_per_epoch
        end = min(self._steps, (step // per_epoch + 1) * per_epoch)
        before = self._sum_before(step)
        left = self._sums[end - step + step % per_epoch] - before
        # Every epoch has the same rows. An unfinished one at the end is counted by proportion.
        left = left + self._sums[-1] * (self._steps - end) / per_epoch
        tracked = sum(number >= step for number in self.tracked)
        return self._work(left, self._steps - step, tracked, parts)

    def _sum_before(self, step: int, plus: int = 0) -> NDArray[np.float64]:
        """Return the sums of the steps of the same epoch before `step` + `plus`."""
        epoch, index = divmod(step, self._schedule.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._sums = epoch, self._sums_of(epoch)
        sums: NDArray[np.float64] = self._sums[index + plus]
        return sums

    def _sums_of(self, epoch: int) -> NDArray[np.float64]:
        """Return the sums of micro-batches, tokens and pairs before each step of an epoch."""
        per_epoch = self._schedule.steps_per_epoch
        first = epoch * per_epoch
        numbers, columns = self._schedule.size_columns(range(first, first + per_epoch))
        tokens, longest = columns[0].astype(float), columns[3]
        values = np.stack([np.ones(len(numbers)), tokens, tokens * longest])
        by_step = [np.bincount(numbers - first, weights=row, minlength=per_epoch) for row in values]
        return np.concatenate([np.zeros((1, 3)), np.cumsum(np.stack(by_step, axis=1), axis=0)])

    def _work(self, sums: NDArray[np.float64], steps: int, tracked: int, parts: int) -> StepWork:
        micro_batches, tokens, pairs = sums.tolist()
        share = micro_batches / steps
        return StepWork(steps, micro_batches * parts, tokens, pairs, tracked * share * parts)


@dataclass
class TimeLeft:
    """The estimated time that is left of one process of a job, in seconds.

    The time that passes between two events is part of the second one, so nothing is left out. Early
    stopping is not foreseen.
    """

    work: WorkLeft
    planned: PlannedTime
    between: Interruptions
    parts: int = 1
    _fit: StepTimeFit = field(init=False)
    _before: float | None = None
    _evaluations: list[float] = field(default_factory=list)
    _num_best: int = 0
    _checkpoints: list[float] = field(default_factory=list)
    _lap_start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._fit = StepTimeFit(self.planned)

    def lap(self) -> float:
        """Return the seconds since the last call, or since the estimate was created."""
        start, self._lap_start = self._lap_start, time.perf_counter()
        return self._lap_start - start

    def add_step(self, step: int, seconds: float) -> None:
        """Add a finished step. step: counted from 0."""
        self._fit.add(self.work.of(step, self.parts), seconds)

    def restart(self, parts: int) -> None:
        """Forget the steps so far, because the following ones are computed in another way.

        parts: number of parts that each micro-batch is divided into from now on.
        """
        self.parts, self._fit = parts, StepTimeFit(self.planned)

    def add_evaluation(self, step: int, seconds: float, is_best: bool) -> None:
        """Add a finished evaluation after a number of steps. is_best: of those after a step."""
        if step == 0:
            self._before = seconds
            return
        self._evaluations.append(seconds)
        self._num_best += is_best

    def add_checkpoint(self, seconds: float) -> None:
        """Add a checkpoint."""
        self._checkpoints.append(seconds)

    def at_start(self, step: int) -> tuple[float, str] | None:
        """Return the time that is left before the first step of a process and its source.

        step: number of steps that an earlier process did. None if nothing is known. An earlier run
        of the same kind is closer than an evaluation, and an evaluation more than the plan.
        """
        work = self.work.after(step, self.parts)
        seconds, forward = self._fit.seconds(work), self._forward(1.0)
        if self._before and forward and not self.planned.is_measured:
            return seconds * self._before / forward, "estimated from the speed of the evaluation"
        return (seconds, self.planned.source) if self.planned.source else None

    def seconds(self, step: int) -> float:
        """Return the time that is left at the end of step `step`, counted from 1.

        The evaluation and the checkpoint after this step are still to come.
        """
        return self._steps_after(step) + self._evaluations_from(step) + self._checkpoints_from(step)

    def _steps_after(self, step: int) -> float:
        return self._fit.seconds(self.work.after(step, self.parts))

    def _evaluations_from(self, step: int) -> float:
        """Return the time of the evaluations after the steps `step` to the last.

        The first one after a step takes longer, because the memory tracker sees its largest batches
        before.
        """
        number, later = self.between.evaluations_from(step), self._evaluations[1:]
        if not number:
            return 0.0
        one = sum(later) / len(later) if later else self._before or self._forward(1.0)
        return number * one + (0.0 if self._evaluations else self._forward(0.0, 1.0))

    def _forward(self, plain: float, tracked: float = 0.0) -> float:
        """Return the estimated time of forward passes.

        plain: number of complete evaluations. tracked: number of times that the tracker sees the
        largest batches.
        """
        sizes = [*self.between.eval_batches]
        peaks = [sizes[index] for index in sorted(peak_batches(sizes))]
        work = _work_of(sizes).times(plain).plus(_work_of(peaks, tracked=True).times(tracked))
        return self.planned.forward_share * self._fit.seconds(work)

    def _checkpoints_from(self, step: int) -> float:
        between = self.between
        one = _CHECKPOINT_SECONDS + between.checkpoint_bytes / _CHECKPOINT_BYTES_PER_SECOND
        if self._checkpoints:
            one = sum(self._checkpoints) / len(self._checkpoints)
        # The more evaluations were the best so far, the more are expected to be.
        share = (self._num_best + 1) / (len(self._evaluations) + 1)
        return one * (between.checkpoints_from(step) + share * between.best_only_from(step))


def _work_of(sizes: Sequence[BatchSize], tracked: bool = False) -> StepWork:
    """Return the work of batches, without an update."""
    tokens, pairs = sum(b.tokens for b in sizes), sum(b.tokens * b.longest for b in sizes)
    return StepWork(0, len(sizes), tokens, pairs, len(sizes) if tracked else 0)


def _multiples(first: int, last: int, every: int) -> int:
    """Return the number of multiples of `every` from `first` to `last`, both included."""
    return max(0, last // every - (first - 1) // every)


def _due_from(first: int, last: int, every: int | None) -> int:
    """Return how many of the steps `first` to `last` are multiples of `every`, or the last one."""
    if first > last:
        return 0
    found = _multiples(first, last, every) if every else 0
    return found + (not every or last % every != 0)
