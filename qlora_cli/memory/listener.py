"""The protocol between the storage tracker and the objects that receive its events.

The tracker (`tracker.py`) reports each event to one listener. There are two implementations:
`Counter` (`counter.py`) adds the events up, and the planner's `Recording` (`plan/recording.py`)
stores them, so that they can be replayed to a `Counter` later.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from qlora_cli.memory.work import Work


class MemoryListener(Protocol):
    """Receives memory events in the order in which they happen."""

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        """Report a new storage.

        key: identifies the storage until it is freed. category: one of `ledger.CATEGORIES`.
        origin: key of the storage that the operation read, or None if it is not tracked.
        """

    def free(self, key: Hashable) -> None:
        """Report that the storage was freed."""

    def recategorize(self, key: Hashable, category: str) -> None:
        """Count the storage under `category` from now on."""

    def begin_phase(self) -> None:
        """Start a phase of the job: load, one step, evaluation."""

    def end_phase(self, name: str) -> None:
        """End the phase that began last and give it its name."""

    def work(self, work: Work) -> None:
        """Report the work of an operation of a dry run."""

    def mark(self, name: str) -> None:
        """Report that a part of a training step begins: forward, backward, update."""

    def enter_module(self, path: str) -> None:
        """Report that the following events belong to the module at `path`; "" means no module."""

    def release_cache(self) -> None:
        """Report that the job returned its unused cached memory to the device."""
