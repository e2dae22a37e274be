"""Handles Ctrl-C and SIGTERM during training."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

StopRequested = Callable[[], bool]
"""Function that returns whether the user asked to stop."""


@contextmanager
def stop_signals(on_request: Callable[[], object]) -> Iterator[StopRequested]:
    """Handle Ctrl-C and SIGTERM inside the block. Yields a function: has the user asked to stop?

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
