"""Show a job's progress on stderr: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from qlora_cli.events import StepEvent, SweepObserver
from qlora_cli.units import format_bytes, format_duration

SECONDS_BETWEEN_LINES = 5.0
"""Minimum time between plain lines. The first and the last step are always printed."""


@contextmanager
def watching(console: Console) -> Iterator[SweepObserver]:
    """Yield an observer that shows on `console` the events of the job inside the block."""
    if not console.is_terminal:
        yield PlainLines(console)
        return
    live = LiveLine(console)
    with live.progress:
        yield live


def describe(event: StepEvent) -> str:
    """Return `loss 1.234 | 2,413 tokens/s | memory 5.70 GiB, peak 6.12 GiB | 3 min 20 s left`."""
    memory = "process memory" if event.counts_process else "memory"
    held_out = "" if event.eval_loss is None else f", held-out {event.eval_loss:.3f}"
    return " | ".join(
        (
            f"loss {event.loss:.3f}{held_out}",
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"{memory} {format_bytes(event.live_bytes)}, peak {format_bytes(event.peak_bytes)}",
            f"{format_duration(event.seconds_left)} left",
        )
    )


class LiveLine:
    """An observer that redraws one line in a terminal and prints notes above it."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            # In a narrow terminal the details are wrapped and the counter is complete.
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[details]}", table_column=Column(overflow="fold")),
            console=console,
        )
        self._task: TaskID | None = None
        self._sweep: TaskID | None = None
        self._sweep_start = time.monotonic()

    def begin_run(self, number: int, total: int, name: str) -> None:
        """Set the bar of a sweep to the runs that are done; it stays above the line of the run."""
        if self._sweep is None:
            self._sweep = self.progress.add_task("sweep", total=total, details="")
            self._sweep_start = time.monotonic()
        seconds, done = time.monotonic() - self._sweep_start, number - 1
        left = f" | {format_duration(seconds / done * (total - done))} left" if done else ""
        details = f"{name}{left}"
        self.progress.update(self._sweep, completed=done, total=total, details=details)

    def note(self, text: str) -> None:
        """Print `text` above the line."""
        self.progress.console.print(Text(text), soft_wrap=True)

    def stage(self, name: str, total: int) -> None:
        """Replace the line by one of a new stage with `total` units."""
        if self._task is not None:
            self.progress.remove_task(self._task)
        self._task = self.progress.add_task(name, total=total, details="")

    def advance(self, done: int) -> None:
        """Set the bar to `done` units."""
        if self._task is not None:
            self.progress.update(self._task, completed=done)

    def step(self, event: StepEvent) -> None:
        """Set the bar to the step, and show its loss, speed and memory."""
        if self._task is None:
            self.stage("train", event.steps)
        assert self._task is not None
        details = describe(event)
        self.progress.update(self._task, completed=event.step, total=event.steps, details=details)


class PlainLines:
    """An observer that prints a line every few seconds, for logs.

    clock: returns seconds and never decreases.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._stage = ""
        self._total = 0
        self._printed_at = 0.0

    def note(self, text: str) -> None:
        """Print `text`."""
        self._print(text)

    def begin_run(self, number: int, total: int, name: str) -> None:
        """Print the name and the number of a run of a sweep."""
        self._print(f"run {number:,} of {total:,}: {name}")

    def stage(self, name: str, total: int) -> None:
        """Print the name of the new stage and its number of units."""
        self._stage, self._total = name, total
        self._print(f"{name}: 0 of {total:,}")

    def advance(self, done: int) -> None:
        """Print the progress if the last line is old enough and the stage is not complete."""
        if done < self._total and self._is_due():
            self._print(f"{self._stage}: {done:,} of {self._total:,}")

    def step(self, event: StepEvent) -> None:
        """Print the first step, the last step and any step if the last line is old enough."""
        if event.step in (1, event.steps) or self._is_due():
            self._print(f"step {event.step:,} of {event.steps:,} | {describe(event)}")

    def _is_due(self) -> bool:
        return self._clock() - self._printed_at >= SECONDS_BETWEEN_LINES

    def _print(self, text: str) -> None:
        self._printed_at = self._clock()
        self._console.print(Text(text), soft_wrap=True)
