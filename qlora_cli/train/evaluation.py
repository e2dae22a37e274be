"""Evaluations on the held-out set: before, during and after training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from qlora_cli.data.collate import Batch, peak_batches
from qlora_cli.events import Observer
from qlora_cli.memory.instrument import Instrument
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import (
    EVAL_LOSS,
    Evaluation,
    append_line,
    best_evaluation,
    evaluation_metrics,
    read_evaluations,
)
from qlora_cli.tasks.task import EvalScore
from qlora_cli.train.state import State
from qlora_cli.train.stop_signals import StopRequested
from qlora_cli.train.trackers import Trackers


def _ignore(_: int) -> None: ...


class _Stopped(Exception):
    """The user asked to stop during an evaluation, whose result is not needed then."""


@dataclass
class Evaluator:
    """Evaluates a run on its held-out set and stores each result in metrics.jsonl.

    Each process of a job evaluates the complete set, so the result does not depend on their number;
    that of the main process counts. An evaluation draws no random numbers and changes no parameter,
    so training is the same with and without it.

    batches: of the held-out set, on the CPU; if there are none, nothing is evaluated.
    steps: number of optimizer steps of the job. every: steps between two evaluations.
    done: the evaluations of the run, also those of an earlier process. is_running: an evaluation is
    being done now. seconds: time of the last evaluation of this process; 0 before.
    """

    state: State
    batches: Sequence[Batch]
    steps: int
    every: int | None
    run: RunFolder
    instrument: Instrument
    observer: Observer
    trackers: Trackers
    done: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    is_running: bool = False
    _is_tracked: bool = False

    def __post_init__(self) -> None:
        processes = self.state.processes
        done = read_evaluations(self.run.metrics, self._metric) if processes.is_main else []
        self.done = processes.broadcast(done)

    @property
    def _metric(self) -> str | None:
        """The metric whose highest value is best; None for the lowest loss."""
        return self.state.recipe.best_metric

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss, or the highest metric; not that before training."""
        return best_evaluation(self.done)

    @property
    def goal(self) -> str:
        """What a better evaluation has, as text: `lower held-out loss`."""
        return "lower held-out loss" if self._metric is None else f"higher {self._metric}"

    @property
    def best_text(self) -> str:
        """The best value so far as text: `the lowest held-out loss (0.361)`."""
        assert self.best is not None
        if self._metric is None:
            return f"the lowest held-out loss ({self.best.loss:.3f})"
        return f"the highest {self._metric} ({self.best.metric:.3f})"

    def metrics_of(self, step: int) -> dict[str, float]:
        """Return the task's other metrics after `step`; empty if it was not evaluated."""
        found = evaluation_metrics(self.run.metrics, step)
        return {name: found[name] for name in self.state.task.metric_names if name in found}

    @property
    def last(self) -> Evaluation | None:
        """The evaluation that was done last."""
        return self.done[-1] if self.done else None

    @property
    def out_of_patience(self) -> bool:
        """Whether as many evaluations as `train.patience` followed the best one."""
        patience, best = self.state.recipe.train.patience, self.best
        if patience is None or best is None:
            return False
        return sum(evaluation.step > best.step for evaluation in self.done) >= patience

    def _is_due(self, step: int) -> bool:
        return step in (0, self.steps) or (self.every is not None and step % self.every == 0)

    def evaluate_if_due(self, is_stop_requested: StopRequested) -> Evaluation | None:
        """Evaluate and return the result; None if no evaluation is due after the state's step.

        One is due before the first step, after the last one, and every `every` steps. It is not
        repeated after a resume. Returns None as well if the user asks to stop meanwhile; a process
        that resumes the run then evaluates.
        """
        step = self.state.step
        if (
            not self._is_due(step)
            or not self.batches
            or any(item.step == step for item in self.done)
        ):
            return None
        start = time.perf_counter()
        self.is_running = True
        with suppress(_Stopped):
            score = self._score(is_stop_requested)
            self.is_running, self.seconds = False, time.perf_counter() - start
            return self._record(score)
        self.is_running = False
        return None

    def _score(self, is_stop_requested: StopRequested) -> EvalScore:
        """Return the score on all batches.

        Once the optimizer's states exist, the batches that determine peak memory are evaluated
        first with the memory tracker, which would slow down a complete evaluation. Cached memory of
        another size than training or evaluation needs is returned before and after.
        """
        state = self.state
        self.instrument.release_cache()
        if state.has_optimizer_states and not self._is_tracked:
            indices = sorted(peak_batches([batch.size for batch in self.batches]))
            with self.instrument.phase("eval"):
                peaks = _until_stop([self.batches[index] for index in indices], is_stop_requested)
                state.task.evaluate(state.loaded, peaks, state.device)
            self._is_tracked = True
        with self.instrument.count_only("eval"):
            batches = _until_stop(self.batches, is_stop_requested, self._report_progress())
            score = state.task.evaluate(state.loaded, batches, state.device)
        self.instrument.release_cache()
        return state.processes.broadcast(score)

    def _report_progress(self) -> Callable[[int], object]:
        """Return the function that is called with the number of evaluated batches.

        During training the progress of the steps stays visible instead.
        """
        if self.state.step > 0:
            return _ignore
        self.observer.stage("evaluate", len(self.batches))
        return self.observer.advance

    def _record(self, score: EvalScore) -> Evaluation:
        """Write the line of metrics.jsonl, report the result and return it."""
        earlier_best = self.best
        metric = None if self._metric is None else score.metrics[self._metric]
        evaluation = Evaluation(self.state.step, score.loss, metric)
        line: dict[str, Any] = {
            "step": evaluation.step,
            EVAL_LOSS: score.loss,
            f"eval_{self.state.task.target_name}": score.num_targets,
            **score.metrics,
            "seconds": self.seconds,
        }
        if self.state.processes.is_main:
            append_line(self.run.metrics, line)
        self.trackers.log(line, evaluation.step)
        self.done.append(evaluation)
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in score.metrics.items())
        shown = f" ({metrics})" if self.state.task.metric_names else ""
        self.observer.note(f"{self._describe(evaluation, earlier_best)}{shown}")
        return evaluation

    def _describe(self, evaluation: Evaluation, earlier_best: Evaluation | None) -> str:
        if evaluation.step == 0:
            return f"held-out loss before training: {evaluation.loss:.3f}"
        text = f"step {evaluation.step:,}: held-out loss {evaluation.loss:.3f}"
        if earlier_best is None:
            return text
        if self._metric is not None:
            best = self.best or earlier_best
            return f"{text}; the highest {self._metric} is {best.metric:.3f} at step {best.step:,}"
        if evaluation is self.best:
            return f"{text}, the lowest so far (before: {earlier_best.loss:.3f})"
        return f"{text}; the lowest is {earlier_best.loss:.3f} at step {earlier_best.step:,}"


def _until_stop(
    batches: Sequence[Batch],
    is_stop_requested: StopRequested,
    advance: Callable[[int], object] = _ignore,
) -> Iterator[Batch]:
    """Yield the batches, and report their number with `advance`. Raises _Stopped if requested."""
    for done, batch in enumerate(batches):
        if is_stop_requested():
            raise _Stopped
        advance(done)
        yield batch
