"""Causal attention over rows laid one behind the other, registered with transformers as `qlora`.

A batch has no padding: all rows of a micro-batch, packed or not, form one sequence (1, tokens), and
`Spans` says where each row lies. A row attends to itself only, so packing cannot leak. Because this
attention is registered without a mask function, transformers builds no mask: a mask would be
tokens x tokens and, with grouped heads, push SDPA to its slow and memory-hungry MATH kernel.

Two roads. On CUDA cards with FlashAttention one variable-length call does all rows; elsewhere each
row is its own SDPA call. `split` and not slicing: the backward of a slice allocates the whole
tensor. A plan takes the kernel that its target would take (`kernel_for`): on meta tensors SDPA
falls to MATH in silence, which no real device would choose here.

Letters: B batch (always 1 in training), H heads, G key/value heads, T query and S key positions, D
head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from qlora_cli.device import DeviceProfile

NAME = "qlora"
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_SIZE = 256
FLASH_CAPABILITY = (8, 0)

Kernel = Literal["varlen", "efficient", "cpu"]
"""varlen: FlashAttention over all rows; efficient: SDPA's memory-efficient kernel, a row at a time;
cpu: SDPA's FlashAttention for CPUs, a row at a time."""


@dataclass(frozen=True)
class Spans:
    """Where rows lie in a sequence without padding.

    lengths: of the rows, in order. kernel: which the device has. offsets: the rows' starts and the
    end, (rows + 1,) int32 on the device; None where the kernel is not varlen.
    """

    lengths: tuple[int, ...]
    kernel: Kernel
    offsets: Tensor | None = None

    @property
    def longest(self) -> int:
        """Of the rows, in tokens."""
        return max(self.lengths)

    @classmethod
    def on(cls, lengths: tuple[int, ...], device: torch.device, kernel: Kernel) -> Spans:
        """With offsets where the variable-length kernel will be asked for."""
        if kernel != "varlen":
            return cls(lengths, kernel)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        if device.type == "meta":
            offsets = torch.empty(len(starts), dtype=torch.int32, device=device)
        else:
            offsets = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
        return cls(lengths, kernel, offsets)


def kernel_for(profile: DeviceProfile, compute: torch.dtype) -> Kernel:
    """Return the attention kernel that a device uses for tensors of the dtype `compute`."""
    if profile.kind != "cuda":
        return "cpu"
    capability = profile.capability
    flash = capability is not None and capability >= FLASH_CAPABILITY and compute in FLASH_DTYPES
    return "varlen" if flash else "efficient"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    spans: Spans | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, G, S, D) -> (B, T, H, D).

    Without `spans` the whole sequence is one row, and T < S means that the first S - T keys come
    from a cache. `dropout` is 0 by construction: the base's own dropout is switched off at load.
    """
    assert attention_mask is None, "this attention is registered so that no mask is built"
    assert dropout == 0.0, "the base's dropout is switched off when it is loaded"
    if spans is not None and spans.offsets is not None and _flash_takes(query):
        return _attend_flash(query, key, value, scaling, sliding_window, spans), None
    kernel: Kernel = "cpu" if spans is None else spans.kernel
    lengths = (query.shape[2],) if spans is None else spans.lengths
    if len(lengths) == 1:
        out = _attend_row(query, key, value, scaling, sliding_window, kernel)
        return out.transpose(1, 2).contiguous(), None
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    rows = [
        _attend_row(*row, scaling, sliding_window, kernel)
        for row in zip(queries, keys, values, strict=True)
    ]
    return torch.cat([row.transpose(1, 2) for row in rows], dim=1), None


def _flash_takes(query: Tensor) -> bool:
    return query.dtype in FLASH_DTYPES and query.shape[-1] <= FLASH_HEAD_SIZE


def _attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    spans: Spans,
) -> Tensor:
    """All rows in one call; grouped heads are taken as they are."""
    assert query.shape[0] == 1, "rows lie in one sequence"
    window_left = None if window is None else window - 1
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(t.squeeze(0).transpose(0, 1) for t in (query, key, value)),
        spans.offsets,
        spans.offsets,
        spans.longest,
        spans.longest,
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=window_left,
        window_size_right=None if window is None else 0,
    )[0]
    return out.unsqueeze(0)


def _attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    kernel: Kernel,
) -> Tensor:
    """One row (B, H, T, D) -> (B, H, T, D). kernel: of the target, where tensors are imagined."""
    queries, keys = query.shape[2], key.shape[2]
    narrow = window is not None and keys > window
    mask = _mask(queries, keys, window, query.device) if narrow or 1 < queries < keys else None
    causal = mask is None and queries == keys
    grouped = key.shape[1] != query.shape[1]
    if grouped and (query.is_cuda or (query.is_meta and kernel != "cpu")):
        # SDPA's memory-efficient kernel has no grouped heads; with them it would fall to MATH.
        key, value = _for_all_heads(query, key, value)
        grouped = False
    if query.is_meta:
        return _imagine_row(query, key, value, mask, causal, scaling, kernel)
    with sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        set_priority=True,
    ):
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=grouped,
        )


def _imagine_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    kernel: Kernel,
) -> Tensor:
    """What SDPA would do on the target, on meta tensors."""
    # SDPA turns what may be seen into what is added.
    bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype)
    if kernel == "cpu":
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scaling
        )[0]
        return out
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], *bias.shape)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), 0.0, causal, scale=scaling
    )[0]
    return out


def _for_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: what each query may see, its own position being the last of its row."""
    key_at = torch.arange(keys, device=device)
    query_at = torch.arange(keys - queries, keys, device=device)[:, None]
    seen = key_at <= query_at
    return seen if window is None else seen & (key_at > query_at - window)


AttentionInterface.register(NAME, attend)
