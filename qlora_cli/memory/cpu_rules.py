"""What CPU kernels allocate inside themselves, where no dispatch mode can see it.

Found with torch's profiler, which sees every allocation, and checked against it (tests/plan). On
CUDA element-wise kernels cast in registers and need none of these. A rule is left out where its
bytes are bounded by a constant (a thread's buffers in attention, a few hundred KiB).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.memory.tracker import KernelRules, TemporaryRule

_HELD_BY_QUANTIZATION = {
    ("nf4", 4): 9.5,
    ("nf4", 2): 13.5,
    ("fp4", 4): 23.5,
    ("fp4", 2): 27.5,
}
"""(quant_type, bytes of a weight) -> bytes that bitsandbytes' quantize_4bit holds inside for each
weight, beside its output."""


def _mixed_dtypes(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Sequence[int]:
    """An element-wise operation casts whole operands and its output to the common dtype."""
    operands = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.dim() > 0]
    if len(operands) < 2:
        return ()
    common = torch.promote_types(operands[0].dtype, operands[1].dtype)
    return tuple(_cast(operands, output, common))


def _cast(operands: Sequence[Tensor], output: Tensor, common: torch.dtype) -> Iterator[int]:
    for tensor in (*operands, output):
        if tensor.dtype != common:
            yield tensor.numel() * common.itemsize


def _quantize_4bit(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Sequence[int]:
    weight, quant_type = args[0], args[2]
    return (int(weight.numel() * _HELD_BY_QUANTIZATION[quant_type, weight.element_size()]),)


_ON_CPU: Mapping[str, TemporaryRule] = {
    **{
        f"aten::{name}.{overload}": _mixed_dtypes
        for name in ("add", "sub", "mul", "div")
        for overload in ("Tensor", "out")
    },
    **{f"aten::{name}_.Tensor": _mixed_dtypes for name in ("add", "sub", "mul", "div")},
    "bitsandbytes::quantize_4bit": _quantize_4bit,
}
"""By the operation's name, so that bitsandbytes need not be imported to state a rule."""

CPU_RULES = KernelRules(_ON_CPU)
