"""Counts every storage's life, on real and on imagined tensors alike.

Why an own instrument: torch's MemTracker raises on frozen parameters and takes 35 s for an 8B
model; FakeTensorMode cannot build packed weights and changes transformers' mask; the allocator's
counters exist only on CUDA and know no categories. A dispatch mode that holds a weak reference to
each new storage sees the same bytes as the allocator is asked for, on `meta`, CPU and CUDA.

What it cannot see: what a kernel allocates inside itself. `rules` (memory/rules.py) name these for
operations where it matters; the rest is shown as `other` beside the device's own counter.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_cli.memory.ledger import CATEGORIES, Phase

TemporaryRule = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Sequence[int]]
"""(args, kwargs, output) of an operation -> bytes of each temporary inside its kernel."""

_active: list[StorageTracker] = []


@dataclass
class _Entry:
    """A living storage. num_bytes is rounded as the device's allocator rounds."""

    num_bytes: int
    category: str
    reference: weakref.ref[Any] | None = None


class StorageTracker(TorchDispatchMode):
    """While entered, every new storage is counted under the current category (`scope`).

    rules: temporaries inside kernels, by the operation's name. granularity: the allocator's
    rounding in bytes, 512 on CUDA. device_type: count only storages there (`cuda`), for real runs.
    counts_host: whether what is made under `host_memory` belongs to the device, for plans, where
    everything is on meta: true for a CPU, false for a card. Storages that lived before are counted
    by `tag`.
    """

    def __init__(
        self,
        rules: Mapping[str, TemporaryRule] | None = None,
        granularity: int = 1,
        counts_host: bool = True,
        device_type: str | None = None,
    ) -> None:
        super().__init__()
        self.category = "activations"
        self.counts_host = counts_host
        self._device_type = device_type
        self.off_device = False
        self._rules = dict(rules or {})
        self._granularity = granularity
        self._living: dict[int, _Entry] = {}
        self._by_category: dict[str, int] = defaultdict(int)
        self._live_bytes = 0
        self._peak_bytes = 0
        self._at_peak: dict[str, int] = {}
        self._phases: dict[str, Phase] = {}

    def __enter__(self) -> StorageTracker:
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.remove(self)
        super().__exit__(*exception)

    @property
    def live_bytes(self) -> int:
        """Of all counted storages, now."""
        return self._live_bytes

    @property
    def peak_bytes(self) -> int:
        """The most since the current phase began."""
        return self._peak_bytes

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases seen so far, in order; a phase seen twice is its worse time."""
        return tuple(self._phases.values())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The peak of what happens inside becomes the phase's."""
        self._peak_bytes, self._at_peak = self._live_bytes, self._composition()
        yield
        seen = Phase(name, self._peak_bytes, self._live_bytes, self._at_peak)
        before = self._phases.get(name)
        if before is None or before.peak_bytes <= seen.peak_bytes:
            self._phases[name] = seen

    def tag(self, tensors: Iterable[Tensor], category: str) -> None:
        """Counts these tensors' storages under `category` from now on, known or new."""
        assert category in CATEGORIES, category
        for tensor in tensors:
            storage = tensor.untyped_storage()
            entry = self._living.get(storage._cdata)
            if entry is None:
                self._count(storage, category)
            elif entry.category != category:
                self._by_category[entry.category] -= entry.num_bytes
                self._by_category[category] += entry.num_bytes
                entry.category = category
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes, self._at_peak = self._live_bytes, self._composition()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and _accumulates_in_place(args):
            return args[0].add_(args[1])
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        rule = self._rules.get(func.name())
        inside = 0 if rule is None else sum(map(self._rounded, rule(args, kwargs, output)))
        if self._live_bytes + inside > self._peak_bytes:
            self._peak_bytes = self._live_bytes + inside
            self._at_peak = self._composition()
            if inside:
                self._at_peak["temporary"] = self._at_peak.get("temporary", 0) + inside
        return output

    def _composition(self) -> dict[str, int]:
        return {name: self._by_category[name] for name in CATEGORIES if self._by_category[name]}

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._granularity) * self._granularity

    def _see(self, tensor: Tensor) -> None:
        if self.off_device or self._device_type not in (None, tensor.device.type):
            return
        storage = tensor.untyped_storage()
        entry = self._living.get(storage._cdata)
        if entry is None:
            self._count(storage, self.category)
            return
        grown = self._rounded(storage.nbytes()) - entry.num_bytes
        if grown:
            entry.num_bytes += grown
            self._add(grown, entry.category)

    def _count(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        entry = _Entry(self._rounded(storage.nbytes()), category)
        self._living[key] = entry
        self._add(entry.num_bytes, category)

        def died(_: Any) -> None:
            # The address may already belong to a newer storage; only this one's entry goes.
            if self._living.get(key) is entry:
                del self._living[key]
            self._add(-entry.num_bytes, entry.category)

        entry.reference = weakref.ref(storage, died)

    def _add(self, num_bytes: int, category: str) -> None:
        self._live_bytes += num_bytes
        self._by_category[category] += num_bytes


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


@contextlib.contextmanager
def unallocated() -> Iterator[None]:
    """What is made inside are shapes without bytes, in a plan too."""
    with _off_device(bool(_active)):
        yield


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """What is made inside lies on the host; a plan for a card does not count it."""
    with _off_device(bool(_active) and not _active[-1].counts_host):
        yield


@contextlib.contextmanager
def _off_device(uncounted: bool) -> Iterator[None]:
    if not uncounted:
        yield
        return
    tracker = _active[-1]
    outer, tracker.off_device = tracker.off_device, True
    try:
        yield
    finally:
        tracker.off_device = outer


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


def _accumulates_in_place(args: tuple[Any, ...]) -> bool:
    """Whether this addition is the autograd engine's own, which runs in place without a mode.

    The engine adds two gradients of one tensor into the first when it holds the last reference to
    it, but never while a dispatch mode listens; counted as it stands, it would cost a tensor that
    the real job never allocates.
    """
    if len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
        return False
    into, other = args
    if into.shape != other.shape or into.dtype != other.dtype or into.requires_grad:
        return False
    uses: int = torch._C._storage_Use_Count(into.untyped_storage()._cdata)
    return _called_by_engine() and uses <= 2


def _called_by_engine() -> bool:
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_name in {"_fn", "inner"}:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
