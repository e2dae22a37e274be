"""Tracks the lifetime of every tensor storage, on real tensors and on meta tensors alike.

`StorageTracker` is a dispatch mode that keeps a weak reference to each new storage. It reports each
storage's creation and end to a `MemoryListener`, and counts the same bytes on `meta`, CPU and CUDA
that the allocator is asked for. torch's own instruments do not fit: MemTracker raises an error on
frozen parameters and takes 35 s for an 8B model, FakeTensorMode cannot build packed weights and
changes the mask that transformers builds, and the allocator's counters exist only on CUDA and have
no categories.

A dispatch mode cannot observe the memory that a kernel allocates inside itself. `KernelRules`
describe it for the operations for which it matters. The rest appears in the category `other`, which
is computed from the device's own counter.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_cli.memory.ledger import CATEGORIES
from qlora_cli.memory.listener import MemoryListener
from qlora_cli.memory.meta_operations import MetaOperations
from qlora_cli.memory.operations import accumulates_in_place, origins
from qlora_cli.memory.scopes import Location, activate, deactivate

TemporaryRule = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Sequence[int]]
"""(args, kwargs, output) of an operation -> bytes of each temporary inside its kernel."""


@dataclass(frozen=True)
class KernelRules:
    """The memory that the kernels of one device allocate inside themselves.

    temporaries: operation name -> rule for temporaries that are freed when the operation returns.
    workspace_bytes: workspace of cuBLAS. Two threads multiply matrices, the caller's and
    autograd's; each of them allocates one workspace at its first matrix product and keeps it.
    """

    temporaries: Mapping[str, TemporaryRule] = field(default_factory=dict)
    workspace_bytes: int = 0


_MATRIX_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm"))


@dataclass
class _TrackedStorage:
    """A living storage. key: None if it is in host memory, or if its end was reported already."""

    key: int | None
    num_bytes: int
    category: str
    reference: weakref.ref[Any] | None = None


class StorageTracker(TorchDispatchMode):
    """Reports every new storage to `listener` while it is entered as a context manager.

    rules: memory inside kernels. device_type: track only storages on this device type (`cuda`,
    `cpu`, or `meta` for a dry run); None tracks all. counts_host_memory: in a dry run all tensors
    are on meta; this flag states whether tensors created under `scopes.host_memory` count (true for
    a CPU, false for a GPU). Use `tag` to count storages that existed before the tracker was
    entered.
    """

    def __init__(
        self,
        listener: MemoryListener,
        rules: KernelRules,
        device_type: str | None = None,
        counts_host_memory: bool = True,
    ) -> None:
        super().__init__()
        self.listener = listener
        self.category = "activations"
        self.location: Location = "device"
        self.counts_host_memory = counts_host_memory
        self._rules = rules
        self._device_type = device_type
        self._living: dict[int, _TrackedStorage] = {}
        self._keys = itertools.count()
        self._threads_with_workspace: set[str] = set()
        self._part_of_step = "forward"
        self._operations = MetaOperations()
        self.work_factor = 1.0
        self.recomputes = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every operation, which takes a tenth of a plan. Nothing is compiled here.
        return False

    def __enter__(self) -> StorageTracker:
        activate(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        deactivate(self)
        super().__exit__(*exception)

    def mark(self, name: str) -> None:
        """Report that a part of a training step begins: forward, backward, update."""
        self._part_of_step = name
        self.listener.mark(name)

    def tag(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of these tensors under `category` from now on.

        Storages that the tracker has not met before are added.
        """
        assert category in CATEGORIES, category
        for tensor in tensors:
            storage = tensor.untyped_storage()
            tracked = self._living.get(storage._cdata)
            if tracked is None:
                if self._is_tracked(tensor):
                    self._add(storage, category)
            elif tracked.key is not None and tracked.category != category:
                tracked.category = category
                self.listener.recategorize(tracked.key, category)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Report that the storages of these tensors are freed, before the tensors end."""
        for tensor in tensors:
            tracked = self._living.get(tensor.untyped_storage()._cdata)
            if tracked is not None and tracked.key is not None:
                self.listener.free(tracked.key)
                tracked.key = None

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
        name = func.name()
        if self._device_type == "meta":
            output, work = self._operations.run(func, args, kwargs)
        else:
            output, work = func(*args, **kwargs), None
        self._track_output(output, args)
        if self._rules.workspace_bytes and func._schema.name in _MATRIX_PRODUCTS:
            self._allocate_workspace(args)
        if work is not None and self.location == "device":
            work = work.times(self.work_factor)._replace(recomputed=self.recomputes)
            self.listener.work(work)
        rule = self._rules.temporaries.get(name)
        if rule is not None and self.location == "device":
            self._allocate_temporaries(rule(args, kwargs, output))
        return output

    def _allocate_workspace(self, args: tuple[Any, ...]) -> None:
        """Count the workspace of a matrix product, unless its tensors are on another device."""
        if not any(isinstance(arg, Tensor) and self._is_tracked(arg) for arg in args):
            return
        thread = "backward" if self._part_of_step == "backward" else "forward"
        if thread not in self._threads_with_workspace:
            self._threads_with_workspace.add(thread)
            self.listener.allocate(next(self._keys), self._rules.workspace_bytes, "temporary")

    def _track_output(self, output: Any, args: tuple[Any, ...]) -> None:
        if self.location == "nowhere":
            return
        outputs = [output] if isinstance(output, Tensor) else tree_leaves(output)
        for tensor, origin in zip(outputs, origins(args, len(outputs)), strict=True):
            if not isinstance(tensor, Tensor) or not self._is_tracked(tensor):
                continue
            storage = tensor.untyped_storage()
            tracked = self._living.get(storage._cdata)
            if tracked is None:
                self._add(storage, self.category, origin)
            elif storage.nbytes() != tracked.num_bytes:
                self._resize(tracked, storage.nbytes())

    def _is_tracked(self, tensor: Tensor) -> bool:
        return self._device_type in (None, tensor.device.type)

    def _allocate_temporaries(self, sizes: Sequence[int]) -> None:
        keys = [next(self._keys) for _ in sizes]
        for key, num_bytes in zip(keys, sizes, strict=True):
            self.listener.allocate(key, num_bytes, "temporary")
        # Variables of a kernel in C++ end in the opposite order.
        for key in reversed(keys):
            self.listener.free(key)

    def _resize(self, tracked: _TrackedStorage, num_bytes: int) -> None:
        if tracked.key is None:
            return
        old_key, tracked.key, tracked.num_bytes = tracked.key, next(self._keys), num_bytes
        self.listener.allocate(tracked.key, num_bytes, tracked.category)
        self.listener.free(old_key)

    def _add(
        self, storage: torch.UntypedStorage, category: str, origin: Tensor | None = None
    ) -> None:
        address = storage._cdata
        source = None if origin is None else self._living.get(origin.untyped_storage()._cdata)
        key = None if self.location == "host" else next(self._keys)
        tracked = _TrackedStorage(key, storage.nbytes(), category)
        self._living[address] = tracked
        if key is not None:
            self.listener.allocate(key, tracked.num_bytes, category, source.key if source else None)

        def on_death(_: Any) -> None:
            # A newer storage may already use the address. Remove only the entry of this storage.
            if self._living.get(address) is tracked:
                del self._living[address]
            if tracked.key is not None:
                self.listener.free(tracked.key)

        tracked.reference = weakref.ref(storage, on_death)


@contextlib.contextmanager
def track_gradients(parameters: Iterable[nn.Parameter], tracker: StorageTracker) -> Iterator[None]:
    """Count gradients under `gradients` as soon as they are accumulated into a parameter.

    parameters: those with `requires_grad=False` are skipped.
    """

    def tag_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.tag([parameter.grad], "gradients")

    hooks = [
        parameter.register_post_accumulate_grad_hook(tag_gradient)
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
