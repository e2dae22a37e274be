"""Attention over rows in one sequence without padding, registered with transformers.

A batch has no padding: all rows of a micro-batch, packed or not, form one sequence (1, tokens), and
`Spans` gives the lengths of the rows. A row attends to itself only, so packed rows cannot leak into
each other. This attention is registered without a mask function, so transformers builds no mask.
A mask would have tokens x tokens entries, and with grouped heads it would select SDPA's slow MATH
kernel, which needs much memory.

There are three code paths. On a CUDA GPU with FlashAttention, one variable-length call computes all
rows. Otherwise each row is one SDPA call, or plain operations if no kernel computes it
(`plain_attention.py`). Rows come from `split` and not from slicing, because the backward pass of a
slice allocates the whole tensor. Decoders attend causally, encoders to the complete row. A dry run
uses the kernel of the target device (`kernel_for`): on meta tensors SDPA silently selects MATH,
which no real device selects here.

Letters: B batch (always 1 in training), H heads, G key/value heads, T query and S key positions, D
head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from qlora_cli.device import DeviceProfile
from qlora_cli.nn.attention_arguments import is_causal, refusal, refuse, refuse_arguments
from qlora_cli.nn.plain_attention import PlainSettings, plain_attention
from qlora_cli.nn.prefix import add_prefix, check_window, prefix_of
from qlora_cli.nn.spans import Kernel, Spans, current_spans, first_visible_key

NAME = "qlora"
"""Name under which transformers finds this attention (`attn_implementation`)."""
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_SIZE = 256
FLASH_CAPABILITY = (8, 0)


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention. query (B, H, T, D), key and value (B, G, S, D) -> (B, T, H, D).

    It is causal, unless the module or the argument `is_causal` states that it is not.

    Without `use_spans` the sequence is one row, and T < S means that the first S - T keys come from
    a cache. softcap: soft cap on the scores. s_aux: (H,), attention sinks. Raises ModelError if
    transformers passes an argument that is not handled here: ignoring it would compute another
    model.
    """
    refuse_arguments(module, {"attention_mask": attention_mask, "dropout": dropout or None}, others)
    causal = is_causal(module, others)
    spans = current_spans()
    if spans is not None and query.shape[2] != key.shape[2]:
        raise refusal(module, "keys that are not those of its tokens")
    prefix = prefix_of(module)
    if prefix is None:
        given = (scaling, sliding_window, softcap, s_aux)
        return _attend(module, query, key, value, spans, causal, *given), None
    check_window(sliding_window, key.shape[2] if spans is None else spans.longest, prefix.length)
    rows = add_prefix(prefix, query, key, value, spans)
    given = (scaling, None, softcap, s_aux)
    output = _attend(module, rows.query, rows.key, rows.value, rows.spans, causal, *given)
    return rows.kept(output, prefix.length), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None,
    causal: bool,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Compute the rows of `spans`, with the arguments of `attend`, and return (B, T, H, D)."""
    if (size := _chunk_size(module)) is not None:
        first = first_visible_key(query.shape[2], key.shape[2], size)
        key, value = key[:, :, first:], value[:, :, first:]
        if query.shape[2] == key.shape[2]:
            spans = (spans or Spans((query.shape[2],), "cpu")).in_chunks(size, query.device)
    kernel: Kernel = "cpu" if spans is None else spans.kernel
    if softcap is not None or s_aux is not None or _needs_plain_operations(query, value, kernel):
        refuse(module, [] if causal else ["is_causal=False"])
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        settings = PlainSettings(scaling, sliding_window, softcap)
        attend_row = partial(plain_attention, sinks=s_aux, settings=settings)
        return _attend_rows(attend_row, query, key, value, spans)
    if spans is not None and spans.offsets is not None and _supports_flash(query, value):
        return _attend_flash(query, key, value, scaling, sliding_window, spans, causal)
    attend_row = partial(
        _attend_row, scaling=scaling, window=sliding_window, kernel=kernel, causal=causal
    )
    return _attend_rows(attend_row, query, key, value, spans)


def _chunk_size(module: nn.Module) -> int | None:
    """Return the size of the chunks of a row that attend to themselves only (Llama 4), or None."""
    config: Any = getattr(module, "config", None)
    index = getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or index is None or kinds[index] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)


def _needs_plain_operations(query: Tensor, value: Tensor, kernel: Kernel) -> bool:
    """Return whether a CPU has no fused kernel: for values of another size than queries."""
    is_on_cpu = query.device.type == "cpu" or (query.is_meta and kernel == "cpu")
    return is_on_cpu and query.shape[-1] != value.shape[-1]


def _attend_rows(
    attend_row: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None,
) -> Tensor:
    """Compute each row on its own and return (B, T, H, D) of all."""
    lengths = (query.shape[2],) if spans is None else spans.lengths
    if len(lengths) == 1:
        return attend_row(query, key, value).transpose(1, 2).contiguous()
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    rows = [attend_row(*row) for row in zip(queries, keys, values, strict=True)]
    return torch.cat([row.transpose(1, 2) for row in rows], dim=1)


def _supports_flash(query: Tensor, value: Tensor) -> bool:
    is_head_size = query.shape[-1] == value.shape[-1] <= FLASH_HEAD_SIZE
    return query.dtype in FLASH_DTYPES and is_head_size


def _attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    spans: Spans,
    causal: bool,
) -> Tensor:
    """Compute all rows in one call. The kernel supports grouped heads."""
    assert query.shape[0] == 1, "all rows are in one sequence"
    window_left = None if window is None else window - 1
    window_right = None if window is None else 0 if causal else window - 1
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(t.squeeze(0).transpose(0, 1) for t in (query, key, value)),
        spans.offsets,
        spans.offsets,
        spans.longest,
        spans.longest,
        0.0,
        causal,
        False,
        scale=scaling,
        window_size_left=window_left,
        window_size_right=window_right,
    )[0]
    return out.unsqueeze(0)


def _attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    kernel: Kernel,
    causal: bool = True,
) -> Tensor:
    """Compute one row (B, H, T, D) -> (B, H, T, D). kernel: used on meta tensors only."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    window_applies = window is not None and num_keys > window
    needs_mask = window_applies or (causal and 1 < num_queries < num_keys)
    mask = _mask(num_queries, num_keys, window, query.device, causal) if needs_mask else None
    causal = causal and mask is None and num_queries == num_keys
    grouped = key.shape[1] != query.shape[1]
    if grouped and (query.is_cuda or (query.is_meta and kernel != "cpu")):
        # SDPA's memory-efficient kernel does not support grouped heads and would select MATH.
        key, value = _repeat_heads(query, key, value)
        grouped = False
    if query.is_meta:
        return _attend_row_on_meta(query, key, value, mask, causal, scaling, kernel)
    attention = partial(
        functional.scaled_dot_product_attention,
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=grouped,
    )
    if query.device.type == "cpu":
        # SDPA has one fused kernel for CPUs and prefers it.
        return attention()
    with sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        set_priority=True,
    ):
        return attention()


def _attend_row_on_meta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    kernel: Kernel,
) -> Tensor:
    """Call the operation that SDPA selects on the target device."""
    # SDPA converts a boolean mask to a bias of the query's dtype.
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


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return key and value with one head for each query head."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device, causal: bool
) -> Tensor:
    """Return (queries, keys) bool: True if the query attends to the key.

    The last query is at the position of the last key. Three queries, five keys, causal, no window:

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1

    Without causality a window of 2 reaches one key to both sides. Three queries, three keys:

        1 1 0
        1 1 1
        0 1 1
    """
    key_positions = torch.arange(num_keys, device=device)
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    if not causal:
        assert window is not None, "without a window every key is visible"
        return (key_positions - query_positions).abs() < window
    visible = key_positions <= query_positions
    return visible if window is None else visible & (key_positions > query_positions - window)


AttentionInterface.register(NAME, attend)
