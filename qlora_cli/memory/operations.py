"""What single operations do to storages, as the tracker has to know it.

Apart from what they return: which tensor an output was made of, which operations only write into
what is there, and which addition the autograd engine does in place when no tracker listens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_WRITES_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        *("add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "addmm_", "pow_.Scalar"),
        *("exp_", "rsqrt_", "round_", "clamp_min_", "index_fill_.int_Scalar", "copy_"),
    )
)
"""What these do to an imagined tensor is nothing; torch takes half a millisecond to find out."""
_WRITES_OUT = frozenset({"aten::mul.out", "aten::div.out", "aten::silu_backward.grad_input"})
"""The same, for operations that are told where to write."""


def written_into(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What an operation on imagined tensors writes into, where that is all that it does.

    name: with its overload, `aten::add_.Tensor`. None where it has to be run.
    """
    into = args[0] if name in _WRITES_ONLY else None
    if name in _WRITES_OUT:
        into = next(kwargs[key] for key in ("out", "grad_input") if key in kwargs)
    return into if isinstance(into, Tensor) and into.is_meta and into.numel() else None


def origins(args: tuple[Any, ...], num_outputs: int) -> Sequence[Tensor | None]:
    """For each output the tensor it was made of: its fellow in a list, or the first one."""
    first = args[0] if args else None
    if isinstance(first, list | tuple):
        fellows = [item if isinstance(item, Tensor) else None for item in first]
        return fellows if len(fellows) == num_outputs else [None] * num_outputs
    return [first if isinstance(first, Tensor) else None] * num_outputs


def accumulates_in_place(args: tuple[Any, ...]) -> bool:
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
