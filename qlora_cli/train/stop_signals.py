"""Handles Ctrl-C, SIGTERM and SIGHUP (a closed terminal) during a training job."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
StopRequested = Callable[[], bool]
"""Function that returns whether the user asked to stop."""


@contextmanager
def stop_signals(on_request: Callable[[], object]) -> Iterator[StopRequested]:
    """Handle the signals inside the block. Yields a function: has the user asked to stop?

    on_request: called at once at the first signal. The loop stops after its current step. A second
    Ctrl-C raises KeyboardInterrupt at once.
    """
    is_requested = False

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal is_requested
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not is_requested:
            is_requested = True
            on_request()

    with _handled((signal.SIGINT, *_endings()), handle) as is_handled:
        yield lambda: is_handled and is_requested


@contextmanager
def endings_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM and SIGHUP inside the block, as at Ctrl-C.

    So the job ends in order and records that it was interrupted. Later ones are ignored, because a
    closed terminal and a shutdown send several, and the record must be written.
    """
    has_ended = False

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal has_ended
        if not has_ended:
            has_ended = True
            raise KeyboardInterrupt

    with _handled(_endings(), handle):
        yield


def _endings() -> list[signal.Signals]:
    """Return the signals that end a job. A signal that is ignored, as after nohup, is not one."""
    return [number for number in _ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _handled(
    numbers: Sequence[signal.Signals], handle: Callable[[int, FrameType | None], None]
) -> Iterator[bool]:
    """Handle signals inside the block. Yields False if that is not possible in this thread."""
    try:
        previous = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:
        # Only the main thread may set signal handlers; elsewhere the caller stops its own thread.
        yield False
        return
    try:
        yield True
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
