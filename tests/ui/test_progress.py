"""Progress on stderr: plain lines in logs, a live line in a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from qlora_cli.events import StepEvent
from qlora_cli.ui.progress import LiveLine, PlainLines, describe, watching
from qlora_cli.units import GIB


def event(step: int, steps: int = 100) -> StepEvent:
    return StepEvent(step, steps, 1.25, 1e-4, 0.5, 2048, 2413.0, 5 * GIB, 6 * GIB, 200.0)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_a_step_is_described_by_loss_speed_memory_and_time() -> None:
    text = describe(event(1))
    assert text == "loss 1.250 | 2,413 tokens/s | memory 5.00 GiB, peak 6.00 GiB | 3 min 20 s left"


def test_memory_of_the_process_is_labelled() -> None:
    assert "| process memory 5.00 GiB," in describe(replace(event(1), counts_process=True))


def test_plain_lines_are_throttled_except_for_the_first_and_the_last_step(
    stream: io.StringIO,
) -> None:
    clock = Clock()
    lines = PlainLines(Console(file=stream, width=200), clock)
    for step in range(1, 101):
        clock.now += 0.1
        lines.step(event(step))
    written = stream.getvalue().splitlines()
    assert written[0].startswith("step 1 of 100")
    assert written[-1].startswith("step 100 of 100")
    assert len(written) == 3


def test_plain_lines_print_stages_and_notes_immediately(stream: io.StringIO) -> None:
    clock = Clock()
    lines = PlainLines(Console(file=stream, width=200), clock)
    lines.stage("load", 291)
    lines.advance(1)
    clock.now += 60
    lines.advance(40)
    lines.advance(291)
    lines.note("base.compute_dtype = bfloat16: [because]")
    assert stream.getvalue().splitlines() == [
        "load: 0 of 291",
        "load: 40 of 291",
        "base.compute_dtype = bfloat16: [because]",
    ]


def test_no_control_codes_without_a_terminal(stream: io.StringIO) -> None:
    with watching(Console(file=stream)) as observer:
        assert isinstance(observer, PlainLines)
        observer.stage("train", 2)
        observer.step(event(2, 2))
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_live_line(stream: io.StringIO) -> None:
    console = Console(file=stream, force_terminal=True, width=160)
    with watching(console) as observer:
        assert isinstance(observer, LiveLine)
        observer.advance(1)  # Before any stage there is no bar; this must not fail.
        observer.stage("load", 10)
        observer.advance(10)
        observer.note("a note")
        observer.step(event(1))
        observer.step(event(2))
    assert "a note" in stream.getvalue()
    assert "loss 1.250" in stream.getvalue()


def test_the_counter_is_complete_in_a_narrow_terminal(stream: io.StringIO) -> None:
    live = LiveLine(Console(file=io.StringIO(), force_terminal=True, width=80))
    live.step(event(123, 1000))
    Console(file=stream, width=80).print(live.progress.get_renderable())
    assert "123/1000" in stream.getvalue()
