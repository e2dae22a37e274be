"""Progress events of a job, and the interface that receives them.

A job reports its progress to an `Observer` and prints nothing itself. `ui/progress.py` implements
the interface for the terminal; `Silent` ignores all events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class StepEvent:
    """One completed optimizer step; `metrics.jsonl` stores these values.

    step: number of the step, from 1. steps: total number of steps.
    loss: mean loss over the trained tokens of the step, in nats.
    lr: learning rate of the step.
    grad_norm: total L2 norm of the gradients before clipping.
    tokens: number of tokens in the step, including tokens that are not trained on.
    tokens_per_second: throughput of the step.
    live_bytes: allocated memory after the step.
    peak_bytes: peak memory during the step.
    seconds_left: estimated time for the remaining steps.
    joules: energy of the step; None if the device does not measure it.
    eval_loss: the last loss on the held-out set, of this step or an earlier one; None before the
    first evaluation. counts_process: the memory is that of the whole process, with Python and its
    libraries, because the job runs on a CPU. These two are not in `metrics.jsonl`.
    metrics: the task's other metrics by name; `metrics.jsonl` has them with the prefix `train_`.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    live_bytes: int
    peak_bytes: int
    seconds_left: float
    joules: float | None = None
    eval_loss: float | None = None
    counts_process: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class Observer(Protocol):
    """Receives the events of a job in order.

    A job calls `stage` at the start of each stage, then `advance` or `step` during it. `note` can
    come at any time.
    """

    def note(self, text: str) -> None:
        """Show one line to the user: an automatic choice, a finding, the path of a written file."""

    def stage(self, name: str, total: int) -> None:
        """Start a stage, such as `load`, `train` or `merge`; total: its number of units."""

    def advance(self, done: int) -> None:
        """Report progress; done: number of units of the current stage that are complete so far."""

    def step(self, event: StepEvent) -> None:
        """Report a completed optimizer step."""


class SweepObserver(Observer, Protocol):
    """Receives the events of the runs of a sweep."""

    def begin_run(self, number: int, total: int, name: str) -> None:
        """Start run `number`, from 1, of `total` runs. name: its settings, for people."""


class Silent:
    """An `Observer` that ignores all events, for tests and for calls from Python."""

    def note(self, text: str) -> None:
        """Ignore the text."""

    def stage(self, name: str, total: int) -> None:
        """Ignore the start of a stage."""

    def advance(self, done: int) -> None:
        """Ignore the progress."""

    def step(self, event: StepEvent) -> None:
        """Ignore the step."""

    def begin_run(self, number: int, total: int, name: str) -> None:
        """Ignore the start of a run of a sweep."""
