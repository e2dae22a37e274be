"""Sees every storage's life, on real and on imagined tensors alike.

Why an own instrument: torch's MemTracker raises on frozen parameters and takes 35 s for an 8B
model; FakeTensorMode cannot build packed weights and changes transformers' mask; the allocator's
counters exist only on CUDA and know no categories. A dispatch mode that holds a weak reference to
each new storage sees the same bytes as the allocator is asked for, on `meta`, CPU and CUDA.

It only sees. What it saw goes to a sink: a `Counter` adds it up in a real job, a `Recording` keeps
it for a plan.

What it cannot see: what a kernel allocates inside itself. `Rules` name these for operations where
it matters; the rest is shown as `other` beside the device's own counter.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_cli.memory.ledger import CATEGORIES
from qlora_cli.memory.operations import accumulates_in_place, origins, written_into

TemporaryRule = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Sequence[int]]
"""(args, kwargs, output) of an operation -> bytes of each temporary inside its kernel."""


@dataclass(frozen=True)
class Rules:
    """What kernels of one device allocate inside.

    temporaries: by the operation's name; gone when it returns. workspace_bytes: kept from the first
    matrix product of each of the two threads on, the caller's and autograd's (cuBLAS).
    """

    temporaries: Mapping[str, TemporaryRule] = field(default_factory=dict)
    workspace_bytes: int = 0


class Sink(Protocol):
    """Receives what the tracker saw, in order."""

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        """A storage is made; origin: the one that the operation worked on, where known."""

    def free(self, key: Hashable) -> None:
        """It is gone."""

    def recategorize(self, key: Hashable, category: str) -> None:
        """It belongs to `category` from now on."""

    def mark(self, name: str) -> None:
        """A part of a step begins: forward, backward, update."""

    def enter(self, path: str) -> None:
        """What follows belongs to the module at `path`; to none where it is empty."""


_MATRIX_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm"))
_active: list[StorageTracker] = []


@dataclass
class _Entry:
    """A living storage. key: None for one that lies elsewhere and is not told of."""

    key: int | None
    num_bytes: int
    category: str
    reference: weakref.ref[Any] | None = None


class StorageTracker(TorchDispatchMode):
    """While entered, every new storage is told under the current category (`scope`).

    device_type: see only storages there: `cuda` or `cpu`, `meta` for plans. counts_host: whether
    what is made under `host_memory` belongs to the device, for plans, where everything is on meta:
    true for a CPU, false for a card. Storages that lived before are counted by `tag`.
    """

    def __init__(
        self, sink: Sink, rules: Rules, device_type: str | None = None, counts_host: bool = True
    ) -> None:
        super().__init__()
        self.category = "activations"
        self.counts_host = counts_host
        self.place: Literal["device", "host", "nowhere"] = "device"
        self.sink = sink
        self._rules = rules
        self._device_type = device_type
        self._living: dict[int, _Entry] = {}
        self._keys = itertools.count()
        self._products_on: set[str] = set()
        self._part_of_step = "forward"

    def __enter__(self) -> StorageTracker:
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.remove(self)
        super().__exit__(*exception)

    @property
    def num_living(self) -> int:
        """Storages that are watched now."""
        return len(self._living)

    def mark(self, name: str) -> None:
        """A part of a step begins."""
        self._part_of_step = name
        self.sink.mark(name)

    def tag(self, tensors: Iterable[Tensor], category: str) -> None:
        """Counts these tensors' storages under `category` from now on, known or new."""
        assert category in CATEGORIES, category
        for tensor in tensors:
            storage = tensor.untyped_storage()
            entry = self._living.get(storage._cdata)
            if entry is None:
                if self._is_watched(tensor):
                    self._begin(storage, category)
            elif entry.key is not None and entry.category != category:
                entry.category = category
                self.sink.recategorize(entry.key, category)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and accumulates_in_place(args):
            return args[0].add_(args[1])
        if self._rules.workspace_bytes and func._schema.name in _MATRIX_PRODUCTS:
            self._workspace()
        name = func.name()
        output = written_into(name, args, kwargs) if self._device_type == "meta" else None
        if output is None:
            output = func(*args, **kwargs)
        self._see(output, args)
        rule = self._rules.temporaries.get(name)
        if rule is not None and self.place == "device":
            self._inside(rule(args, kwargs, output))
        return output

    def _workspace(self) -> None:
        thread = "backward" if self._part_of_step == "backward" else "forward"
        if thread not in self._products_on:
            self._products_on.add(thread)
            self.sink.allocate(next(self._keys), self._rules.workspace_bytes, "temporary")

    def _see(self, output: Any, args: tuple[Any, ...]) -> None:
        if self.place == "nowhere":
            return
        outputs = [output] if isinstance(output, Tensor) else tree_leaves(output)
        for tensor, origin in zip(outputs, origins(args, len(outputs)), strict=True):
            if not isinstance(tensor, Tensor) or not self._is_watched(tensor):
                continue
            storage = tensor.untyped_storage()
            entry = self._living.get(storage._cdata)
            if entry is None:
                self._begin(storage, self.category, origin)
            elif storage.nbytes() != entry.num_bytes:
                self._resize(entry, storage.nbytes())

    def _is_watched(self, tensor: Tensor) -> bool:
        return self._device_type in (None, tensor.device.type)

    def _inside(self, sizes: Sequence[int]) -> None:
        keys = [next(self._keys) for _ in sizes]
        for key, num_bytes in zip(keys, sizes, strict=True):
            self.sink.allocate(key, num_bytes, "temporary")
        for key in keys:
            self.sink.free(key)

    def _resize(self, entry: _Entry, num_bytes: int) -> None:
        if entry.key is None:
            return
        old, entry.key, entry.num_bytes = entry.key, next(self._keys), num_bytes
        self.sink.allocate(entry.key, num_bytes, entry.category)
        self.sink.free(old)

    def _begin(
        self, storage: torch.UntypedStorage, category: str, origin: Tensor | None = None
    ) -> None:
        address = storage._cdata
        known = None if origin is None else self._living.get(origin.untyped_storage()._cdata)
        key = None if self.place == "host" else next(self._keys)
        entry = _Entry(key, storage.nbytes(), category)
        self._living[address] = entry
        if key is not None:
            self.sink.allocate(key, entry.num_bytes, category, known.key if known else None)

        def died(_: Any) -> None:
            # The address may already belong to a newer storage; only this one's entry goes.
            if self._living.get(address) is entry:
                del self._living[address]
            if entry.key is not None:
                self.sink.free(entry.key)

        entry.reference = weakref.ref(storage, died)


@contextlib.contextmanager
def scope(category: str) -> Iterator[None]:
    """New storages inside belong to `category`; costs next to nothing where no tracker listens."""
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
    """What these tensors hold belongs to `category` from now on."""
    if _active:
        _active[-1].tag(tensors, category)


def mark(name: str) -> None:
    """A part of a step begins: forward, backward, update."""
    if _active:
        _active[-1].mark(name)


@contextlib.contextmanager
def module_scope(path: str) -> Iterator[None]:
    """What is made inside belongs to the module at `path`; a plan repeats a block's for others."""
    if not _active:
        yield
        return
    sink = _active[-1].sink
    sink.enter(path)
    try:
        yield
    finally:
        sink.enter("")


@contextlib.contextmanager
def unallocated() -> Iterator[None]:
    """What is made inside are shapes without bytes, in a plan too."""
    with _placed("nowhere" if _active else None):
        yield


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """What is made inside lies on the host; a plan for a card does not count it."""
    with _placed("host" if _active and not _active[-1].counts_host else None):
        yield


def is_on_host() -> bool:
    """Whether a plan is under way whose device has the host's memory."""
    return bool(_active) and _active[-1].counts_host


@contextlib.contextmanager
def _placed(place: Literal["host", "nowhere"] | None) -> Iterator[None]:
    if place is None:
        yield
        return
    tracker = _active[-1]
    outer, tracker.place = tracker.place, place
    try:
        yield
    finally:
        tracker.place = outer


@contextlib.contextmanager
def gradients_of(parameters: Iterable[nn.Parameter], tracker: StorageTracker) -> Iterator[None]:
    """Parameters' gradients are counted as `gradients` from the moment they are accumulated."""

    def arrived(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.tag([parameter.grad], "gradients")

    hooks = [
        parameter.register_post_accumulate_grad_hook(arrived)
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
