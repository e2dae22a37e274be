"""Rules for the memory that CUDA kernels allocate inside themselves.

A dispatch mode cannot observe this memory. The rules were derived from the sources of PyTorch and
FlashAttention and are checked against the real caching allocator (tools/validation/plan_vs_run.py).
They cover memory from torch's allocator. Memory that libraries take from the driver directly is not
part of a plan.

Letters: H heads, G key/value heads, D head size, T tokens of all rows, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.tracker import KernelRules
from qlora_cli.units import MIB

_WORKSPACE = 2 * 4 * MIB + 8 * 16 * 1024
"""Bytes of cuBLAS' default `CUBLAS_WORKSPACE_CONFIG`, :4096:2:16:8."""
_WORKSPACE_HOPPER = 32 * MIB
_HOPPER = (9, 0)
_NORM_CHUNK = 65536
"""Elements that one thread block of `_foreach_norm` sums."""


def cuda_rules(profile: DeviceProfile) -> KernelRules:
    """Return the rules of the GPU that `profile` describes."""
    is_hopper = profile.capability is not None and profile.capability >= _HOPPER
    return KernelRules(
        temporaries={
            "aten::_flash_attention_backward": _flash_backward,
            "aten::_foreach_norm.Scalar": _foreach_norm,
        },
        workspace_bytes=_WORKSPACE_HOPPER if is_hopper else _WORKSPACE,
    )


def _flash_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Sequence[int]:
    """Return the temporaries of FlashAttention's backward pass, in bytes.

    They are softmax_d (H, T') and dq (T', H, D), both float32, with T' = T + 128 R. With grouped
    heads (G < H), dk and dv are allocated for all H heads.
    """
    query, key, offsets = args[1], args[2], args[6]
    tokens, heads, size = query.shape
    padded = tokens + 128 * (offsets.shape[0] - 1)
    temporaries = [4 * heads * padded, 4 * padded * heads * _rounded_head(size)]
    if key.shape[1] != heads:
        temporaries += [key.shape[0] * heads * size * query.element_size()] * 2
    return temporaries


def _rounded_head(size: int) -> int:
    step = 32 if size <= 128 else 64
    return -(-size // step) * step


def _foreach_norm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Sequence[int]:
    """Return the bytes of the partial sums of `_foreach_norm`.

    Every tensor gets one float32 per chunk, for as many chunks as the largest tensor has.
    """
    tensors: Sequence[Tensor] = args[0]
    chunks = max(-(-tensor.numel() // _NORM_CHUNK) for tensor in tensors)
    return (len(tensors) * chunks * 4,)
