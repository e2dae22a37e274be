"""Rules for the memory that CPU kernels allocate inside themselves.

A dispatch mode cannot observe this memory. The rules were derived from the records of torch's
profiler, which contain every allocation, and are checked against it in tests/plan. CUDA's
element-wise kernels cast in registers and need none of them. There is no rule for memory that a
constant bounds, such as a thread's buffers in attention (a few hundred KiB).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.memory.tracker import KernelRules, TemporaryRule

_QUANTIZATION_BYTES = {
    ("nf4", 4): 9.5,
    ("nf4", 2): 13.5,
    ("fp4", 4): 23.5,
    ("fp4", 2): 27.5,
}
"""(quant_type, bytes of one value) -> bytes of temporary memory that bitsandbytes' quantize_4bit
needs per value, in addition to its output."""


def _mixed_dtypes(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Sequence[int]:
    """Return the bytes of the casts of an element-wise operation with mixed dtypes.

    The kernel casts complete operands and its output to the common dtype.
    """
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
    return (int(weight.numel() * _QUANTIZATION_BYTES[quant_type, weight.element_size()]),)


_ON_CPU: Mapping[str, TemporaryRule] = {
    **{
        f"aten::{name}.{overload}": _mixed_dtypes
        for name in ("add", "sub", "mul", "div")
        for overload in ("Tensor", "out")
    },
    **{f"aten::{name}_.Tensor": _mixed_dtypes for name in ("add", "sub", "mul", "div")},
    "bitsandbytes::quantize_4bit": _quantize_4bit,
}
"""Operation name -> rule. With names, bitsandbytes need not be imported here."""

CPU_RULES = KernelRules(_ON_CPU)
