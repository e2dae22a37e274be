"""Token and position tables that stay 16 bit in storage and hand out rows in the compute dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrozenEmbedding(nn.Module):
    """weight (entries, hidden), frozen. Only the rows looked up are ever cast."""

    def __init__(self, weight: Tensor, compute: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.compute = compute

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...,) int64 -> (..., hidden) in the compute dtype."""
        return functional.embedding(ids, self.weight).to(self.compute)
