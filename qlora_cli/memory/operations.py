"""Properties of single operations that the tracker needs and that their outputs do not show.

These are: the input from which an output was computed, the operations that only write into an
existing tensor, and the addition that the autograd engine performs in place if no tracker is
active.
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
        *(
            "add_.Tensor",
            "sub_.Tensor",
            "mul_.Tensor",
            "div_.Tensor",
            "addmm_",
            "addcmul_",
            "pow_.Scalar",
        ),
        *("exp_", "rsqrt_", "round_", "clamp_min_", "index_fill_.int_Scalar", "copy_"),
    )
)
"""In-place operations. They have no effect on a meta tensor, but running one on meta takes torch
half a millisecond, so the tracker skips them."""
_WRITES_OUT = frozenset(
    f"aten::{name}"
    for name in (
        *("mul.out", "div.out", "mm.out", "silu_backward.grad_input"),
        "gelu_backward.grad_input",
    )
)
"""The same for operations with an output argument."""


def written_into(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the meta tensor that an operation writes into if it does nothing else.

    name: operation with its overload, such as `aten::add_.Tensor`. Returns None if the operation
    has to be run.
    """
    target = args[0] if name in _WRITES_ONLY else None
    if name in _WRITES_OUT:
        target = next(kwargs[key] for key in ("out", "grad_input") if key in kwargs)
    return target if isinstance(target, Tensor) and target.is_meta and target.numel() else None


def origins(args: tuple[Any, ...], num_outputs: int) -> Sequence[Tensor | None]:
    """Return for each output the input tensor from which it was computed, None if unknown.

    For an operation on a list it is the tensor at the same index, otherwise the first argument.
    """
    first = args[0] if args else None
    if isinstance(first, list | tuple):
        inputs = [item if isinstance(item, Tensor) else None for item in first]
        return inputs if len(inputs) == num_outputs else [None] * num_outputs
    return [first if isinstance(first, Tensor) else None] * num_outputs


def accumulates_in_place(args: tuple[Any, ...]) -> bool:
    """Return whether autograd would do this addition in place if no dispatch mode were active.

    The engine adds two gradients of one tensor into the first one if it has the last reference to
    it, but never while a dispatch mode is active. Without this correction, the tracker would count
    a tensor that the real job does not allocate.
    """
    if len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
        return False
    target, addend = args
    if target.shape != addend.shape or target.dtype != addend.dtype or target.requires_grad:
        return False
    uses: int = torch._C._storage_Use_Count(target.untyped_storage()._cdata)
    return _called_by_engine() and uses <= 2


def _called_by_engine() -> bool:
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_name in {"_fn", "inner"}:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
