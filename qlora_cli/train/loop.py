"""Steps from the first to the last: metrics, checkpoints, the tracked steps, Ctrl-C."""

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
from qlora_cli.files.atomic import writing
from qlora_cli.memory.device import live_and_peak
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.tracker import track_gradients
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.resume import save_checkpoint
from qlora_cli.train.schedule import learning_rate
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome, train_step

TRACKED_STEPS = 3
"""The first step makes the optimizer's states; two more show the steady state."""
LAST_LOSSES = 10
"""Steps whose mean is reported as the run's training loss."""
_FULL = "earlier checkpoints are whole; free disk space and go on with --resume"


@dataclass
class Timed:
    """Steps of one kind, added up. tokens: all, prompts included."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One more."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class Progress:
    """What the loop did in this process.

    first: the first step, which warms up; tracked, plain: later ones with and without the memory
    instrument, which slows them.
    """

    first: Timed = field(default_factory=Timed)
    tracked: Timed = field(default_factory=Timed)
    plain: Timed = field(default_factory=Timed)

    def add(self, tokens: int, seconds: float, tracked: bool) -> None:
        """After each step."""
        later = self.tracked if tracked else self.plain
        (later if self.steps else self.first).add(tokens, seconds)

    @property
    def steps(self) -> int:
        """Of any kind."""
        return self.first.steps + self.tracked.steps + self.plain.steps

    @property
    def tokens_per_step(self) -> float:
        """The mean; there must be a step."""
        return (self.first.tokens + self.tracked.tokens + self.plain.tokens) / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Of the kind of steps that is least disturbed; 0 where no step was done."""
        for timed in (self.plain, self.tracked, self.first):
            if timed.seconds:
                return timed.tokens / timed.seconds
        return 0.0


@dataclass(frozen=True)
class Loop:
    """One run's loop.

    steps: optimizer steps of the whole job. remember: called after each checkpoint, so that what
    was measured outlives this process, too.
    """

    state: State
    windows: BatchSchedule
    steps: int
    run: RunFolder
    instrument: Instrument
    observer: Observer
    on_checkpoint: Callable[[Progress], object]

    def go(self) -> Progress:
        """From the state's step to the last.

        Raises Interrupted after Ctrl-C, checkpoint written; QloraError where the disk refuses.
        """
        progress = Progress()
        first = self.state.step
        tracked = peak_steps(self.windows, range(first, self.steps))
        tracked |= {*range(first, first + TRACKED_STEPS)}
        self.observer.stage("train", self.steps)
        self.observer.advance(first)
        with _asked_to_stop() as asked:
            while self.state.step < self.steps:
                event = self._one(progress, self.state.step in tracked)
                self._note(event)
                self.observer.step(event)
                self._maybe_checkpoint(progress, asked())
        return progress

    def _one(self, progress: Progress, tracked: bool) -> StepEvent:
        step = self.state.step
        lr = learning_rate(self.state.recipe.train, step, self.steps)
        with self._watching(tracked):
            began = time.perf_counter()
            outcome = train_step(self.state, self.windows.step_batches(step), lr)
            seconds = time.perf_counter() - began
        if outcome.skipped:
            self.observer.note(
                f"step {step + 1}: float16 gradients overflowed; step left out, loss scale halved"
            )
        progress.add(outcome.tokens, seconds, tracked)
        return self._event(outcome, lr, seconds, progress)

    @contextmanager
    def _watching(self, tracked: bool) -> Iterator[None]:
        name = "step" if self.state.optimizer.state else "first_step"
        if not tracked:
            with self.instrument.count_only(name):
                yield
            return
        watch = track_gradients(self.state.trainable.values(), self.instrument.tracker)
        with watch, self.instrument.phase(name):
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

    def _maybe_checkpoint(self, progress: Progress, stop: bool) -> None:
        step = self.state.step
        every = self.state.recipe.train.checkpoint_every
        if stop or step == self.steps or step % every == 0:
            with self.instrument.phase("checkpoint"):
                save_checkpoint(
                    self.run,
                    step,
                    self.state.trainable,
                    self.state.optimizer,
                    self.state.loss_scale.state(),
                )
            self.on_checkpoint(progress)
        if stop and step < self.steps:
            raise Interrupted(
                f"stopped after step {step} of {self.steps}; its checkpoint is written",
                where=str(self.run.path),
                hint="go on with --resume",
            )

    def _note(self, event: StepEvent) -> None:
        """One line in metrics.jsonl. Raises QloraError where the disk refuses."""
        file = self.run.metrics
        with writing(file.name, file, hint=_FULL), file.open("a") as metrics:
            metrics.write(json.dumps(_metrics(event)) + "\n")


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask; the loop stops after its step. A second Ctrl-C stops at once."""
    asked = False

    def ask(_: int, __: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        # Only the main thread may listen; elsewhere the caller stops its own thread.
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _metrics(event: StepEvent) -> dict[str, Any]:
    keep = (
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "peak_bytes",
        "joules",
    )
    return {key: value for key, value in asdict(event).items() if key in keep}
