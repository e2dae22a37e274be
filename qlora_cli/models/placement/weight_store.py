"""Where the packed weights of streamed blocks are while their blocks do not compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_cli.files.disk_tensor import DiskTensor
from qlora_cli.memory.scopes import host_memory
from qlora_cli.nn.embedding import has_own_memory

NUM_BUFFERS = 2
"""Blocks whose weights are on the device: the one that computes and the next one."""


class WeightStore(Protocol):
    """Gives the weights of blocks to buffers. where: the memory, for the user."""

    where: str

    def copy(self, targets: Mapping[str, Tensor]) -> None:
        """Begin to copy weights to parts of a buffer, on the current stream of the device.

        targets: name -> part of a buffer. The copies of a buffer end before it is used again.
        """

    def will_need(self, names: Iterator[str]) -> None:
        """Prepare a copy of these weights, which probably follows."""


class HostWeights:
    """Weights in host memory; pinned for a GPU. device: the one that computes."""

    where = "in CPU memory"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def keep(self, name: str, tensor: Tensor) -> None:
        """Store a tensor of the device."""
        self._tensors[name] = on_host(tensor, self._device, pinned=True)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name -> tensor of all weights."""
        yield from self._tensors.items()

    def copy(self, targets: Mapping[str, Tensor]) -> None:
        """Copy weights to the device."""
        for name, target in targets.items():
            target.copy_(self._tensors[name], non_blocking=True)

    def will_need(self, names: Iterator[str]) -> None:
        """Do nothing: the weights are in memory."""


class DiskWeights:
    """Weights in files. tensors: name -> place in a file; empty in a dry run.

    A CPU's buffers are filled by reading. For a GPU a file is read into one of two pinned buffers,
    which is copied while the next one is filled.
    """

    where = "on disk"

    def __init__(self, tensors: Mapping[str, DiskTensor]) -> None:
        self._tensors = tensors
        self._pinned: list[Tensor] = []
        self._copied: list[Any] = [None] * NUM_BUFFERS
        self._turn = 0

    def copy(self, targets: Mapping[str, Tensor]) -> None:
        """Read weights, and copy them to the device if it is a GPU."""
        if not targets:
            return
        kind = next(iter(targets.values())).device.type
        if kind == "cuda":
            self._copy_to_gpu(targets)
        elif kind == "cpu":
            for name, target in targets.items():
                self._tensors[name].read_into(target)

    def _copy_to_gpu(self, targets: Mapping[str, Tensor]) -> None:
        turn = self._turn = (self._turn + 1) % NUM_BUFFERS
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        size = sum(aligned(target.nbytes) for target in targets.values())
        if not self._pinned or self._pinned[0].nbytes < size:
            for event in self._copied:
                if event is not None:
                    event.synchronize()
            self._pinned = [
                torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)
            ]
        start = 0
        for name, target in targets.items():
            part = self._pinned[turn][start : start + target.nbytes]
            part = part.view(target.dtype).view(target.shape)
            self._tensors[name].read_into(part)
            target.copy_(part, non_blocking=True)
            start += aligned(target.nbytes)
        self._copied[turn] = torch.cuda.current_stream().record_event()

    def will_need(self, names: Iterator[str]) -> None:
        """Let the system read the weights into its cache."""
        if self._tensors:
            for name in names:
                self._tensors[name].will_need()


def on_host(tensor: Tensor, device: torch.device, *, pinned: bool = False) -> Tensor:
    """Return a tensor of `device` in host memory; itself if the device has no other.

    pinned: for fast copies, if the device is a GPU.
    """
    if not has_own_memory(device):
        return tensor
    with host_memory():
        if tensor.is_meta:
            return torch.empty_like(tensor)
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned and tensor.is_cuda)
        return host.copy_(tensor)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in host memory, also if the device has no other."""
    with host_memory():
        if tensor.is_meta:
            return torch.empty_like(tensor)
        return tensor.to("cpu", copy=True)


_ALIGNMENT = 256
"""Every tensor of a buffer begins at a multiple of this many bytes, as in torch's allocator."""


def aligned(num_bytes: int) -> int:
    """Return the bytes that a tensor of `num_bytes` takes in a buffer."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
