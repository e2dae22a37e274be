"""Token and position tables in 16-bit storage that return rows in the compute dtype.

A table is looked up and never multiplied, so it can be stored in host memory: a step of 2,048
tokens needs 16 MB of the 1 GB of an 8B model's token table, and `HostEmbedding` moves only these
rows to the GPU. A position table stays on the GPU, because a full sequence looks up all its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_cli.files.disk_tensor import DiskTensor
from qlora_cli.memory.scopes import counts_host_memory, host_memory


class FrozenEmbedding(nn.Module):
    """A frozen table, weight (entries, hidden). Only the rows that are looked up are cast.

    scale: factor of the rows.
    """

    def __init__(self, weight: Tensor, compute: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.compute = compute
        self.scale = scale
        self.norm: str | None = None
        """Name of a part that the rows pass through."""

    def set_norm(self, name: str, norm: nn.Module) -> None:
        """Let the rows pass through `norm`, which becomes the part `name`."""
        self.norm = name
        self.add_module(name, norm)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...,) int64 to rows (..., hidden) in the compute dtype."""
        rows = _scaled(functional.embedding(ids, self.weight).to(self.compute), self.scale)
        return _normed(self, self.norm, rows)


class HostEmbedding(nn.Module):
    """A frozen table, weight (entries, hidden), in host memory or on disk. Rows are on `device`.

    The weight is not a parameter: transformers reads a model's device from its first parameter, and
    code that moves or shards parameters must not change this one. If it is on disk, `disk` is its
    place, and `weight` is on meta.
    """

    weight: Tensor
    disk: DiskTensor | None = None
    is_on_disk = False
    """Whether the weight is on disk; in a dry run `disk` is None then, too."""

    def __init__(self, table: FrozenEmbedding, device: torch.device) -> None:
        super().__init__()
        self.weight = table.weight.detach()
        self.compute = table.compute
        self.scale = table.scale
        self.norm = table.norm
        if table.norm is not None:
            self.add_module(table.norm, table.get_submodule(table.norm))
        self.device = device

    def put(self, weight: Tensor) -> None:
        """Store a table that is in host memory."""
        self.weight = weight.to(self.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...,) int64 to rows (..., hidden) in the compute dtype, on the device.

        ids should be on the CPU; ids on the GPU cause a synchronization. The rows are cast after
        they have moved.
        """
        with host_memory():
            rows = self._read(ids) if self.disk is not None else self._gather(ids)
        rows = _scaled(upload(rows, self.device).to(self.compute), self.scale)
        return _normed(self, self.norm, rows)

    def _read(self, ids: Tensor) -> Tensor:
        """Return the rows from the disk; for a GPU in pinned memory."""
        assert self.disk is not None
        rows = self.disk.read_rows(ids.flatten().cpu()).view(*ids.shape, -1)
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def _gather(self, ids: Tensor) -> Tensor:
        """Return the rows in pinned memory, which a GPU copies asynchronously."""
        ids = ids.to(self.weight.device)
        rows = torch.empty(
            (ids.numel(), self.weight.shape[1]),
            dtype=self.weight.dtype,
            device=self.weight.device,
            pin_memory=self.device.type == "cuda",
        )
        torch.index_select(self.weight, 0, ids.flatten(), out=rows)
        return rows.view(*ids.shape, -1)


def _scaled(rows: Tensor, scale: float) -> Tensor:
    """Multiply rows that were looked up by `scale`, in place."""
    return rows if scale == 1.0 else rows.mul_(scale)


def _normed(table: nn.Module, name: str | None, rows: Tensor) -> Tensor:
    """Return the rows after the part `name` of the table, if there is one."""
    if name is None:
        return rows
    out: Tensor = table.get_submodule(name)(rows)
    return out


def has_own_memory(device: torch.device) -> bool:
    """Return whether `device` has memory of its own: a GPU, or meta in a dry run for a GPU."""
    return not counts_host_memory() if device.type == "meta" else device.type != "cpu"


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to `device`. A dry run for a GPU counts the copy."""
    if device.type == "meta" and has_own_memory(device):
        return torch.empty_like(tensor)
    return tensor.to(device, non_blocking=True)
