"""The processes that train one job together, and what they exchange.

`Processes` is a job of one process: every exchange returns its own value. `DistributedProcesses`
exchanges values with torch.distributed; `PlannedProcesses` stands for one of several processes in a
dry run. All processes must call the same exchanges in the same order.

This is the only module that calls torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_cli.errors import ProcessLost

_T = TypeVar("_T")
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""The same functions; torch 2.13 has renamed them."""
_LONG = timedelta(days=2)
"""Time that a process waits for another one, which may load the base or evaluate. A process that
ends is noticed at once, because its connections end."""


class Exchange(Protocol):
    """An exchange that runs beside the computation."""

    def wait(self) -> object:
        """Let the following operations wait for its end."""


class Processes:
    """A job of one process.

    rank: number of this process, from 0. size: number of processes. local_rank: number of this
    process on its machine.
    """

    rank = 0
    size = 1
    local_rank = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder and shows the progress."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """Return the indices of this process' items, of `number` items that all have in order."""
        return range(self.rank, number, self.size)

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes in the order of their ranks."""
        return [value]

    def broadcast(self, value: _T) -> _T:
        """Return the value of the main process."""
        return value

    def scatter(self, values: Sequence[_T] | None) -> _T:
        """Return the value for this process, of those of the main process in the order of ranks."""
        assert values is not None
        return values[0]

    def is_any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return flag

    def wait(self) -> None:
        """Wait until all processes are here."""

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of the tensors of all processes."""

    def copy_from_main(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the main process."""

    def add_parts(self, own: Tensor, complete: Tensor) -> None:
        """Write this process' part of the sum of the tensors `complete` of all into `own`.

        The parts are of one size and in the order of the ranks. The values of `complete` are lost.
        """
        own.copy_(complete)

    def gather_parts(self, complete: Tensor, own: Tensor) -> Exchange | None:
        """Begin to write the tensors of all processes, of one size, into `complete`.

        Returns what to wait for before it is read; None if it is there.
        """
        complete.copy_(own)
        return None


SINGLE = Processes()
"""The processes of a job of one process."""


class PlannedProcesses(Processes):
    """The main process of a job of `size` processes that is planned. It exchanges nothing.

    The planned micro-batches are those of one process, so it has all of them.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def share(self, number: int) -> range:
        """Return the indices of all items."""
        return range(number)

    def add_parts(self, own: Tensor, complete: Tensor) -> None:
        """Do nothing."""

    def gather_parts(self, complete: Tensor, own: Tensor) -> Exchange | None:
        """Do nothing: the link copies, and not the device's kernels."""
        return None


class DistributedProcesses(Processes):
    """The processes of torch.distributed, whose default group a launcher's process has joined.

    The default group exchanges tensors on the device. A group of gloo exchanges objects and flags.
    Raises ProcessLost from every exchange if another process has ended.
    """

    def __init__(self, local_rank: int) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.local_rank = local_rank
        self._control: Any = dist.new_group(backend="gloo", timeout=_LONG)

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes in the order of their ranks."""
        values: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(values, value, group=self._control))
        return values

    def broadcast(self, value: _T) -> _T:
        """Return the value of the main process."""
        values = [value]
        self._exchange(lambda: dist.broadcast_object_list(values, group=self._control))
        return values[0]

    def scatter(self, values: Sequence[_T] | None) -> _T:
        """Return the value for this process, of those of the main process."""
        own: list[Any] = [None]
        given = None if values is None else list(values)
        self._exchange(lambda: dist.scatter_object_list(own, given, group=self._control))
        value: _T = own[0]
        return value

    def is_any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        found = torch.tensor([int(flag)])
        self._exchange(lambda: dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control))
        return bool(found.item())

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.is_any(False)

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of the tensors of all processes."""
        self._exchange(lambda: dist.all_reduce(tensor))

    def copy_from_main(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the main process."""
        self._exchange(lambda: dist.broadcast(tensor, 0))

    def add_parts(self, own: Tensor, complete: Tensor) -> None:
        """Write this process' part of the sum of the tensors of all processes into `own`."""
        if complete.is_cpu:
            # gloo's reduce-scatter does the same in a copy of `complete`.
            self.add(complete)
            own.copy_(complete.view(self.size, -1)[self.rank])
        else:
            self._exchange(lambda: _reduce_scatter(own, complete))

    def gather_parts(self, complete: Tensor, own: Tensor) -> Exchange | None:
        """Begin to write the tensors of all processes into `complete`."""
        with _lost_reported():
            work = _all_gather(complete, own, async_op=True)
        return None if work is None else _Reported(work)

    def _exchange(self, action: Callable[[], object]) -> None:
        with _lost_reported():
            action()


class _Reported:
    """An exchange whose error is converted. work: of torch.distributed."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        """Let the following operations wait for its end. Raises ProcessLost."""
        with _lost_reported():
            self._work.wait()


@contextmanager
def _lost_reported() -> Iterator[None]:
    """Convert the error of an exchange whose partner has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            "another process of this job has ended",
            hint=f"its own message has the reason ({str(error).splitlines()[0][:200]})",
        ) from error


def leave() -> None:
    """End the connections of this process at the end of a job."""
    if dist.is_initialized():
        dist.destroy_process_group()
