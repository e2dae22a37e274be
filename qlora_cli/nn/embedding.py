"""Token and position tables that stay 16 bit in storage and hand out rows in the compute dtype.

A table is looked up and never multiplied, so it need not lie where the job computes: of the 1 GB
of an 8B model's token table a step of 2,048 tokens needs 16 MB. `HostEmbedding` moves no more.
A position table stays on the card: a full sequence looks up every row of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_cli.memory.scopes import counts_host_memory, host_memory


class FrozenEmbedding(nn.Module):
    """weight (entries, hidden), frozen. Only the rows looked up are ever cast."""

    def __init__(self, weight: Tensor, compute: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.compute = compute

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...,) int64 -> (..., hidden) in the compute dtype."""
        return functional.embedding(ids, self.weight).to(self.compute)


class HostEmbedding(nn.Module):
    """weight (entries, hidden) in the host's memory; rows come out on `device`.

    The weight is no parameter: transformers takes a model to be where its first parameter is, and
    whoever moves or shards parameters must leave this one alone.
    """

    weight: Tensor

    def __init__(self, table: FrozenEmbedding, device: torch.device) -> None:
        super().__init__()
        self.weight = table.weight.detach()
        self.compute = table.compute
        self.device = device

    def put(self, weight: Tensor) -> None:
        """Takes the table, which is on the host."""
        self.weight = weight.to(self.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...,) int64, best on the host -> (..., hidden) in the compute dtype on the device.

        Ids on the card are waited for. The rows are cast after they have moved.
        """
        with host_memory():
            rows = self._gather(ids.to(self.weight.device))
        return upload(rows, self.device).to(self.compute)

    def _gather(self, ids: Tensor) -> Tensor:
        """Into pinned memory, from which a card copies while the host goes on."""
        rows = torch.empty(
            (ids.numel(), self.weight.shape[1]),
            dtype=self.weight.dtype,
            device=self.weight.device,
            pin_memory=self.device.type == "cuda",
        )
        torch.index_select(self.weight, 0, ids.flatten(), out=rows)
        return rows.view(*ids.shape, -1)


def has_own_memory(device: torch.device) -> bool:
    """Whether a job on `device` has memory beside the host's: on a card, or in the plan for one."""
    return not counts_host_memory() if device.type == "meta" else device.type != "cpu"


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; a plan counts the copy that a card would hold."""
    if device.type == "meta" and has_own_memory(device):
        return torch.empty_like(tensor)
    return tensor.to(device, non_blocking=True)
