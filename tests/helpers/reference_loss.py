"""torch's cross entropy, for comparison with the chunked loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qlora_cli.nn.labels import IGNORE_INDEX


def targets_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (positions of the labels that are not ignored, these labels)."""
    positions = (labels != IGNORE_INDEX).nonzero().flatten()
    return positions, labels[positions]


def reference_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Return the summed cross entropy of all labels that are not ignored, times `scale`.

    hidden: (n, d). head: (V, d). labels: (n,).
    """
    logits = (hidden @ head.t()).float()
    return scale * functional.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )
