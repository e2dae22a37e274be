"""What a job tells while it runs. Jobs speak to an `Observer`; `ui/progress.py` shows it.

Nothing here prints, and no job does: progress goes to stderr, results are returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step, as `metrics.jsonl` keeps it.

    loss: mean over the step's trained tokens, in nats. tokens: all tokens of the step, prompts
    included. live_bytes, peak_bytes: memory now and at most since the step began. joules: None
    where the device does not say. seconds_left: of the whole job.
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


class Observer(Protocol):
    """Receives what happens, in order."""

    def note(self, text: str) -> None:
        """Something the user should know: an automatic choice, a finding, where a file went."""

    def stage(self, name: str, total: int) -> None:
        """A countable piece of work begins (`load`, `train`, `merge`): `total` units."""

    def advance(self, done: int) -> None:
        """`done` units of the current stage are behind us."""

    def step(self, event: StepEvent) -> None:
        """An optimizer step is done."""


class Silent:
    """An observer for callers that want none."""

    def note(self, text: str) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, done: int) -> None: ...

    def step(self, event: StepEvent) -> None: ...
