"""Annotations for code whose memory is tracked: the category, module and location of new tensors.

Layers, loaders and the training step use these functions. Each of them acts on the innermost active
`StorageTracker`. If no tracker is active, they do nothing and cost almost nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from torch import Tensor

from qlora_cli.memory.listener import MemoryListener

Location = Literal["device", "host", "nowhere"]
"""Where new tensors are: in device memory, in host memory, or nowhere (shapes without bytes)."""


class ActiveTracker(Protocol):
    """The part of a storage tracker that the annotations change."""

    category: str
    work_factor: float
    recomputes: bool
    location: Location
    counts_host_memory: bool
    listener: MemoryListener

    def tag(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of these tensors under `category` from now on."""

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Report that the storages of these tensors are freed, before the tensors end."""

    def mark(self, name: str) -> None:
        """Report that a part of a training step begins."""


_active: list[ActiveTracker] = []


def activate(tracker: ActiveTracker) -> None:
    """Make `tracker` the one that the annotations act on."""
    _active.append(tracker)


def deactivate(tracker: ActiveTracker) -> None:
    """Undo `activate`."""
    _active.remove(tracker)


@contextlib.contextmanager
def scope(category: str) -> Iterator[None]:
    """Count new storages inside the block under `category`."""
    if not _active:
        yield
        return
    tracker = _active[-1]
    outer, tracker.category = tracker.category, category
    try:
        yield
    finally:
        tracker.category = outer


def attribute(tensors: Iterable[Tensor], category: str) -> None:
    """Count the storages of these tensors under `category` from now on."""
    if _active:
        _active[-1].tag(tensors, category)


def report_freed(tensors: Iterable[Tensor]) -> None:
    """Report that the caller frees the storages of these tensors, before the tensors end."""
    if _active:
        _active[-1].forget(tensors)


def mark(name: str) -> None:
    """Report that a part of a training step begins: forward, backward, update."""
    if _active:
        _active[-1].mark(name)


@contextlib.contextmanager
def module_scope(path: str) -> Iterator[None]:
    """Attribute the events inside the block to the module at `path`.

    The planner uses this to repeat the events of one transformer block for the other blocks.
    """
    if not _active:
        yield
        return
    listener = _active[-1].listener
    listener.enter_module(path)
    try:
        yield
    finally:
        listener.enter_module("")


@contextlib.contextmanager
def represents(number: float) -> Iterator[None]:
    """Count the work inside the block `number` times.

    A dry run runs some parts of a loop for all, if the others need no more memory.
    """
    if not _active:
        yield
        return
    tracker = _active[-1]
    outer, tracker.work_factor = tracker.work_factor, number
    try:
        yield
    finally:
        tracker.work_factor = outer


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Count the work inside the block as done a second time, by a recomputed block."""
    if not _active:
        yield
        return
    tracker = _active[-1]
    tracker.recomputes = True
    try:
        yield
    finally:
        tracker.recomputes = False


@contextlib.contextmanager
def unallocated() -> Iterator[None]:
    """Do not count new tensors inside the block; they are shapes without memory, also in a plan."""
    with _located("nowhere" if _active else None):
        yield


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """Declare that new tensors inside the block are in host memory.

    A plan for a GPU does not count them. A plan for a CPU counts them, because there host memory is
    the device's memory.
    """
    with _located("host" if _active and not _active[-1].counts_host_memory else None):
        yield


def counts_host_memory() -> bool:
    """Return whether a tracker is active that counts host memory as memory of the device."""
    return bool(_active) and _active[-1].counts_host_memory


@contextlib.contextmanager
def _located(location: Location | None) -> Iterator[None]:
    if location is None:
        yield
        return
    tracker = _active[-1]
    outer, tracker.location = tracker.location, location
    try:
        yield
    finally:
        tracker.location = outer
