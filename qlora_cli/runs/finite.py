"""Trained values that are NaN or infinite are never written.

Each tensor is checked on the host, on its way to a file: that takes no memory on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_cli.errors import NotFinite
from qlora_cli.runs.layout import RunFolder


@contextmanager
def add_last_checkpoint_hint(run: RunFolder) -> Iterator[None]:
    """Adds the step and the path of the last checkpoint of `run` to a NotFinite, or its absence."""
    try:
        yield
    except NotFinite as fault:
        steps = run.steps()
        last = "there is no checkpoint"
        if steps:
            last = f"the last good checkpoint is of step {steps[-1]}: {run.checkpoint(steps[-1])}"
        raise NotFinite(fault.what, where=fault.where, hint=f"{last}; {fault.hint}") from fault
