"""The training loop: optimizer steps, metrics, checkpoints, tracked steps, Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from qlora_cli.data.packing import BatchSchedule
from qlora_cli.errors import Interrupted, MicroBatchTooLarge
from qlora_cli.events import Observer, StepEvent
from qlora_cli.memory.device import live_and_peak
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.tracker import track_gradients
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import append_line
from qlora_cli.runs.resume import remove_old_checkpoints, save_checkpoint
from qlora_cli.train.energy import EnergyCounter
from qlora_cli.train.evaluation import Evaluator
from qlora_cli.train.learning_checks import LearningChecks
from qlora_cli.train.loss_spikes import LossSpikes
from qlora_cli.train.progress import Progress
from qlora_cli.train.schedule import learning_rate
from qlora_cli.train.shortage import (
    Shortage,
    num_recomputed,
    record_shortage,
    reduce_memory,
)
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome, train_step
from qlora_cli.train.stop_signals import StopRequested, stop_signals
from qlora_cli.train.time_left import TimeLeft
from qlora_cli.train.trained_weights import add_weights
from qlora_cli.units import format_duration

LAST_LOSSES = 10
"""Number of last steps whose mean loss is reported as the run's training loss."""
_METRICS = (
    *("step", "loss", "lr", "grad_norm", "tokens"),
    *("tokens_per_second", "peak_bytes", "joules"),
)
"""Fields of a StepEvent that metrics.jsonl stores."""


@dataclass(frozen=True)
class TrainingLoop:
    """The loop of one run.

    steps: total number of optimizer steps of the job, including those of an earlier process.
    evaluator: evaluates the held-out set when it is due. base: the folder of the base.
    chat_template: the Jinja text that `data.template` sets, for the checkpoints.
    energy: counts the joules of each step.
    on_checkpoint: called after each checkpoint, to write what has been measured so far.
    may_recompute_more: whether the activation policy may change if memory runs short. parts: number
    of parts that each micro-batch is divided into from the start. time_left: estimates the time
    of the rest, and has the steps that the memory tracker records.
    """

    state: State
    schedule: BatchSchedule
    steps: int
    run: RunFolder
    instrument: Instrument
    observer: Observer
    evaluator: Evaluator
    base: Path
    chat_template: str | None
    energy: EnergyCounter
    on_checkpoint: Callable[[Progress], object]
    time_left: TimeLeft
    may_recompute_more: bool = False
    parts: int = 1

    def train(self) -> Progress:
        """Train from the state's step to the last step, which always writes a checkpoint.

        It ends before the last step if held-out losses do not improve for `train.patience`
        evaluations. Raises Interrupted after Ctrl-C or SIGTERM, with a checkpoint written;
        QloraError if a file cannot be written; NotFinite if training diverges.
        """
        progress = Progress(parts=self.parts)
        checks = LearningChecks(self.state, LossSpikes(self.state, self.schedule))
        first = self.state.step
        self.time_left.lap()
        with stop_signals(partial(self._report_stop, progress)) as is_requested_here:

            def is_stop_requested() -> bool:
                return self.state.processes.is_any(is_requested_here())

            self._evaluate(is_stop_requested)
            if is_stop_requested() and first == 0:
                raise KeyboardInterrupt  # There is nothing to save yet.
            self._report_duration()
            self.observer.stage("train", self.steps)
            self.observer.advance(first)
            while self.state.step < self.steps and not self._stops_early():
                event = self._step(progress, checks, self.state.step in self.time_left.work.tracked)
                self._write_metrics(event)
                self.observer.step(event)
                is_best = self._evaluate(is_stop_requested)
                self._save_if_due(progress, is_stop_requested(), is_best)
        return progress

    def _evaluate(self, is_stop_requested: StopRequested) -> bool:
        """Evaluate if it is due. Return whether the evaluation is the best one so far."""
        evaluation = self.evaluator.evaluate_if_due(is_stop_requested)
        if evaluation is None:
            return False
        is_best = evaluation == self.evaluator.best
        self.time_left.add_evaluation(self.state.step, self.time_left.lap(), is_best)
        return is_best

    def _report_duration(self) -> None:
        """Report the estimated duration before the first step, with its source."""
        if estimate := self.time_left.at_start(self.state.step):
            seconds, source = estimate
            self.observer.note(
                f"training takes about {format_duration(seconds)}, {source}; the time left is "
                "measured from the first step on"
            )

    def _report_stop(self, progress: Progress) -> None:
        """Report at once that the stop signal has arrived, before the step is complete."""
        step = self.state.step
        doing = f"saving step {step}"
        if progress.is_in_step:
            doing = f"finishing step {step + 1}, then saving"
        elif self.evaluator.is_running:
            doing = f"stopping the evaluation after step {step}, then saving"
        self.observer.note(f"{doing}; press Ctrl-C again to stop at once")

    def _stops_early(self) -> bool:
        """Return whether training ends before its last step, and report it."""
        if not self.evaluator.out_of_patience:
            return False
        assert self.evaluator.best is not None
        self.observer.note(
            f"stopped after step {self.state.step:,} of {self.steps:,}: no {self.evaluator.goal} "
            f"in {self.state.recipe.train.patience} evaluations (train.patience); step "
            f"{self.evaluator.best.step:,} has {self.evaluator.best_text}"
        )
        return True

    def _step(self, progress: Progress, checks: LearningChecks, tracked: bool) -> StepEvent:
        """Do one optimizer step and add it to `progress` and `checks`."""
        step = self.state.step
        lr = learning_rate(self.state.recipe.train, step, self.steps)
        with self._measured(tracked):
            progress.is_in_step, start = True, time.perf_counter()
            energy_before = self.energy.read()
            outcome = self._train_step(progress, lr)
            joules = self.energy.since(energy_before)
            progress.is_in_step, seconds = False, time.perf_counter() - start
        if outcome.skipped:
            self.observer.note(
                f"step {step + 1}: float16 gradients overflowed; step skipped, loss scale halved"
            )
        for warning in checks.after_step(outcome, lr):
            self.observer.note(warning)
        progress.add(outcome.tokens, seconds, tracked)
        self.time_left.add_step(step, self.time_left.lap())
        return self._event(outcome, lr, seconds, joules)

    def _train_step(self, progress: Progress, lr: float) -> StepOutcome:
        """Do one optimizer step. If it runs out of memory, reduce what it needs and try again.

        Raises MicroBatchTooLarge if nothing can be reduced any more.
        """
        while True:
            batches = self.schedule.step_batches(self.state.step, progress.parts)
            random_state = torch.get_rng_state()
            try:
                return train_step(self.state, batches, lr)
            except MicroBatchTooLarge as error:
                loaded = self.state.loaded if self.may_recompute_more else None
                finer = self.schedule.step_batches(self.state.step, 2 * progress.parts)
                # An update within the backward pass needs all rows of the step in one pass.
                may_divide = not self.state.recipe.train.update_in_backward
                change = reduce_memory(loaded, progress, may_divide and len(finer) > len(batches))
                if change is None:
                    raise
                reason = error.what
            # After the except block, so that the tensors of the failed pass are freed.
            torch.set_rng_state(random_state)
            self.instrument.release_cache()
            self.time_left.restart(progress.parts)
            self._report_shortage(reason, change, progress)

    def _report_shortage(self, reason: str, change: str, progress: Progress) -> None:
        step = self.state.step + 1
        number = num_recomputed(self.state.loaded)
        if self.state.processes.is_main:
            record_shortage(self.run, Shortage(step, reason, number, progress.parts))
        self.observer.note(
            f"warning: step {step}: {reason}; from now on {change}, and takes more time"
        )

    @contextmanager
    def _measured(self, tracked: bool) -> Iterator[None]:
        """Measure the memory of a step: with the tracker, or with the device's counters only."""
        phase = "step" if self.state.has_optimizer_states else "first_step"
        if not tracked:
            with self.instrument.count_only(phase):
                yield
            return
        gradients = track_gradients(self.state.trainable.values(), self.instrument.tracker)
        with gradients, self.instrument.phase(phase):
            self.instrument.timeline.set_step(self.state.step + 1)
            yield

    def _event(
        self,
        outcome: StepOutcome,
        lr: float,
        seconds: float,
        joules: float | None,
    ) -> StepEvent:
        live, peak = live_and_peak(self.state.device)
        return StepEvent(
            step=self.state.step,
            steps=self.steps,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            tokens=outcome.tokens,
            tokens_per_second=outcome.tokens / seconds,
            live_bytes=live,
            peak_bytes=peak,
            seconds_left=self.time_left.seconds(self.state.step),
            eval_loss=self.evaluator.last.loss if self.evaluator.last else None,
            joules=joules,
            counts_process=self.state.device.type == "cpu",
            metrics=outcome.metrics,
        )

    def _save_if_due(self, progress: Progress, is_stop_requested: bool, is_best: bool) -> None:
        """Write a checkpoint if one is due. Raises Interrupted if the user asked to stop.

        is_best: this step has the best evaluation so far.
        """
        step, train = self.state.step, self.state.recipe.train
        is_last = step == self.steps or self.evaluator.out_of_patience
        is_due = is_last or step % train.checkpoint_every == 0 or (is_best and train.keep_best)
        if is_stop_requested or is_due:
            self._save(step)
            self.on_checkpoint(progress)
            self.time_left.add_checkpoint(self.time_left.lap())
        if is_stop_requested and not is_last:
            raise Interrupted(
                f"stopped after step {step} of {self.steps}; its checkpoint is written",
                where=str(self.run.path),
                hint="resume with --resume, or use the checkpoint: every command takes the run's "
                "folder",
            )

    def _save(self, step: int) -> None:
        """Write the checkpoint of the current step, and remove older ones that are not needed."""
        state = self.state
        with self.instrument.phase("checkpoint"), state.division.completed():
            save_checkpoint(
                self.run,
                step,
                state.trainable,
                state.optimizer,
                state.loss_scale.state(),
                partial(add_weights, state, self.base, self.chat_template),
                state.processes,
            )
        if not state.processes.is_main:
            return
        best = self.evaluator.best
        remove_old_checkpoints(
            self.run, state.recipe.train.keep_checkpoints, best.step if best else None
        )

    def _write_metrics(self, event: StepEvent) -> None:
        """Append the step's line to metrics.jsonl. Raises QloraError if it cannot be written."""
        if not self.state.processes.is_main:
            return
        values = asdict(event)
        line = {key: values[key] for key in _METRICS}
        line |= {f"train_{name}": value for name, value in event.metrics.items()}
        append_line(self.run.metrics, line)
        self.evaluator.trackers.log(line, event.step)
