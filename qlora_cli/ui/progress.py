"""A job's progress on stderr: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from qlora_cli.events import Observer, StepEvent
from qlora_cli.units import format_bytes, format_duration

SECONDS_BETWEEN_LINES = 5.0
"""Of plain output; the first and the last step are always written."""


@contextmanager
def watching(console: Console) -> Iterator[Observer]:
    """An observer that shows on `console` what a job tells while the block runs."""
    if not console.is_terminal:
        yield PlainLines(console)
        return
    live = LiveLine(console)
    with live.progress:
        yield live


def describe(event: StepEvent) -> str:
    """`loss 1.234 | 2,413 tokens/s | memory 5.70 GiB, peak 6.12 GiB | 3 min 20 s left`."""
    return " | ".join(
        (
            f"loss {event.loss:.3f}",
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"memory {format_bytes(event.live_bytes)}, peak {format_bytes(event.peak_bytes)}",
            f"{format_duration(event.seconds_left)} left",
        )
    )


class LiveLine:
    """One line that is drawn over and over, and notes above it."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        """Stays on the screen, above the line."""
        self.progress.console.print(Text(text), soft_wrap=True)

    def stage(self, name: str, total: int) -> None:
        """The line starts anew."""
        if self._task is not None:
            self.progress.remove_task(self._task)
        self._task = self.progress.add_task(name, total=total, told="")

    def advance(self, done: int) -> None:
        """The bar moves to `done`."""
        if self._task is not None:
            self.progress.update(self._task, completed=done)

    def step(self, event: StepEvent) -> None:
        """The bar moves and the figures change."""
        if self._task is None:
            self.stage("train", event.steps)
        assert self._task is not None
        told = describe(event)
        self.progress.update(self._task, completed=event.step, total=event.steps, told=told)


class PlainLines:
    """One line now and then, for logs."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._name = ""
        self._total = 0
        self._written_at = 0.0

    def note(self, text: str) -> None:
        """Always written."""
        self._write(text)

    def stage(self, name: str, total: int) -> None:
        """Says what begins and how much of it there is."""
        self._name, self._total = name, total
        self._write(f"{name}: {total:,} to do")

    def advance(self, done: int) -> None:
        """Written when the last line is old enough; the end of a stage is not news."""
        if done < self._total and self._due():
            self._write(f"{self._name}: {done:,} of {self._total:,}")

    def step(self, event: StepEvent) -> None:
        """Written for the first step, the last one, and when the last line is old enough."""
        if event.step in (1, event.steps) or self._due():
            self._write(f"step {event.step:,} of {event.steps:,} | {describe(event)}")

    def _due(self) -> bool:
        return self._clock() - self._written_at >= SECONDS_BETWEEN_LINES

    def _write(self, text: str) -> None:
        self._written_at = self._clock()
        self._console.print(Text(text), soft_wrap=True)
