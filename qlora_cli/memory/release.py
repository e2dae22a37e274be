"""Frees the memory of tensors that another object may still refer to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlora_cli.memory.scopes import report_freed


def free_now(tensors: Sequence[Tensor]) -> None:
    """Free the memory of tensors that nothing reads any more, views of them included.

    After an exchange, gloo may refer to its tensors for a moment longer. If they were freed with
    their last reference, measured memory would differ between runs.
    """
    report_freed(tensors)
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
