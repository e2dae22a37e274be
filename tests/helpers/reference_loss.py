"""torch's cross entropy, for comparison with the chunked loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qlora_cli.nn.loss import IGNORE_INDEX


def targets_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    positions = (labels != IGNORE_INDEX).nonzero().flatten()
    return positions, labels[positions]


def plain(hidden: Tensor, head: Tensor, labels: Tensor, scale: float) -> Tensor:
    logits = (hidden @ head.t()).float()
    return scale * functional.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )
