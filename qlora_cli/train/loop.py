"""The training loop: optimizer steps, metrics, checkpoints, tracked steps, Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

from qlora_cli.data.packing import BatchSchedule, peak_steps
from qlora_cli.errors import Interrupted
from qlora_cli.events import Observer, StepEvent
from qlora_cli.files.atomic import RESUME_HINT, report_write_errors
from qlora_cli.memory.device import live_and_peak
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.tracker import track_gradients
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.resume import save_checkpoint
from qlora_cli.train.schedule import learning_rate
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome, train_step

TRACKED_STEPS = 3
"""Steps at the start of a process that the memory tracker records: the first one creates the
optimizer states, two more show the steady state."""
LAST_LOSSES = 10
"""Number of last steps whose mean loss is reported as the run's training loss."""
_METRICS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "peak_bytes",
    "joules",
)
"""Fields of a StepEvent that metrics.jsonl stores."""


@dataclass
class StepTimes:
    """Sums over steps of one kind. tokens: all tokens, with or without a target."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Add one step."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class Progress:
    """The steps that this process has done.

    first: the first step, which is slower because kernels and memory are initialized. tracked,
    plain: later steps with and without the memory tracker, which slows a step down.
    """

    first: StepTimes = field(default_factory=StepTimes)
    tracked: StepTimes = field(default_factory=StepTimes)
    plain: StepTimes = field(default_factory=StepTimes)

    def add(self, tokens: int, seconds: float, tracked: bool) -> None:
        """Add one step. tracked: whether the memory tracker was on."""
        later = self.tracked if tracked else self.plain
        (later if self.steps else self.first).add(tokens, seconds)

    @property
    def steps(self) -> int:
        """Number of steps of all kinds."""
        return self.first.steps + self.tracked.steps + self.plain.steps

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens per step. There must be at least one step."""
        return (self.first.tokens + self.tracked.tokens + self.plain.tokens) / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Speed of plain steps, else of tracked ones, else of the first; 0 without a step."""
        for times in (self.plain, self.tracked, self.first):
            if times.seconds:
                return times.tokens / times.seconds
        return 0.0


@dataclass(frozen=True)
class TrainingLoop:
    """The loop of one run.

    steps: total number of optimizer steps of the job, including those of an earlier process.
    on_checkpoint: called after each checkpoint, to write what has been measured so far.
    """

    state: State
    schedule: BatchSchedule
    steps: int
    run: RunFolder
    instrument: Instrument
    observer: Observer
    on_checkpoint: Callable[[Progress], object]

    def train(self) -> Progress:
        """Train from the state's step to the last step, which always writes a checkpoint.

        Raises Interrupted after Ctrl-C or SIGTERM, with a checkpoint written; QloraError if a file
        cannot be written; NotFinite if training diverges.
        """
        progress = Progress()
        first = self.state.step
        tracked_steps = peak_steps(self.schedule, range(first, self.steps))
        tracked_steps |= {*range(first, first + TRACKED_STEPS)}
        self.observer.stage("train", self.steps)
        self.observer.advance(first)
        with _stop_signals() as is_stop_requested:
            while self.state.step < self.steps:
                event = self._step(progress, self.state.step in tracked_steps)
                self._write_metrics(event)
                self.observer.step(event)
                self._save_if_due(progress, is_stop_requested())
        return progress

    def _step(self, progress: Progress, tracked: bool) -> StepEvent:
        """Do one optimizer step and add it to `progress`."""
        step = self.state.step
        lr = learning_rate(self.state.recipe.train, step, self.steps)
        with self._measured(tracked):
            start = time.perf_counter()
            outcome = train_step(self.state, self.schedule.step_batches(step), lr)
            seconds = time.perf_counter() - start
        if outcome.skipped:
            self.observer.note(
                f"step {step + 1}: float16 gradients overflowed; step skipped, loss scale halved"
            )
        progress.add(outcome.tokens, seconds, tracked)
        return self._event(outcome, lr, seconds, progress)

    @contextmanager
    def _measured(self, tracked: bool) -> Iterator[None]:
        """Measure the memory of a step: with the tracker, or with the device's counters only."""
        phase = "step" if self.state.optimizer.state else "first_step"
        if not tracked:
            with self.instrument.count_only(phase):
                yield
            return
        gradients = track_gradients(self.state.trainable.values(), self.instrument.tracker)
        with gradients, self.instrument.phase(phase):
            self.instrument.timeline.set_step(self.state.step + 1)
            yield

    def _event(
        self, outcome: StepOutcome, lr: float, seconds: float, progress: Progress
    ) -> StepEvent:
        live, peak = live_and_peak(self.state.device)
        steps_left = self.steps - self.state.step
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
            seconds_left=steps_left * progress.tokens_per_step / progress.tokens_per_second,
        )

    def _save_if_due(self, progress: Progress, is_stop_requested: bool) -> None:
        """Write a checkpoint if one is due. Raises Interrupted if the user asked to stop."""
        step = self.state.step
        every = self.state.recipe.train.checkpoint_every
        if is_stop_requested or step == self.steps or step % every == 0:
            self._save(step)
            self.on_checkpoint(progress)
        if is_stop_requested and step < self.steps:
            raise Interrupted(
                f"stopped after step {step} of {self.steps}; its checkpoint is written",
                where=str(self.run.path),
                hint="resume with --resume",
            )

    def _save(self, step: int) -> None:
        state = self.state
        with self.instrument.phase("checkpoint"):
            save_checkpoint(
                self.run, step, state.trainable, state.optimizer, state.loss_scale.state()
            )

    def _write_metrics(self, event: StepEvent) -> None:
        """Append one line to metrics.jsonl. Raises QloraError if it cannot be written."""
        values = asdict(event)
        line: dict[str, Any] = {key: values[key] for key in _METRICS}
        file = self.run.metrics
        with report_write_errors(file.name, file, hint=RESUME_HINT), file.open("a") as metrics:
            metrics.write(json.dumps(line) + "\n")


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Handle Ctrl-C and SIGTERM inside the block. Yields a function: has the user asked to stop?

    The loop stops after its current step. A second Ctrl-C raises KeyboardInterrupt at once.
    """
    is_requested = False

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal is_requested
        is_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:
        # Only the main thread may set signal handlers; elsewhere the caller stops its own thread.
        yield lambda: False
        return
    try:
        yield lambda: is_requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
