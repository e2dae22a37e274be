"""Causal attention in plain operations, a chunk of queries at a time.

For what no fused kernel computes: a soft cap on the scores (Gemma 2), attention sinks (gpt-oss),
and, on a CPU, values of another size than queries and keys (MLA). The probabilities of one chunk
are in memory at a time; the backward pass computes them again.

    score = cap * tanh(q k / cap)          without a cap: q k
    p     = exp(score) / (exp(sink) + sum of exp(score))

Letters: B batch, H heads, G key/value heads, R = H / G, T queries, S keys, D head size, c queries
of a chunk, n keys that a chunk attends to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.memory.scopes import represents

CHUNK_ELEMENTS = 2**21
"""Scores of one chunk: 8 MiB in float32."""
_CHUNKS_ON_META = 3
"""The last chunk, which may have fewer queries, the largest one and another."""


@dataclass(frozen=True)
class PlainSettings:
    """scaling: factor of q k. window: of keys that a query attends to. cap: soft cap on scores."""

    scaling: float
    window: int | None = None
    cap: float | None = None


class _Chunk(NamedTuple):
    """A chunk of queries and the range of keys that at least one of them attends to."""

    queries: slice
    keys: slice
    visible: Tensor
    """(c, n) bool."""


class _Probabilities(NamedTuple):
    """values: (B, G, R, c, n) float32. sink: (B, G, R, c, 1). slope: d score / d (scaled q k)."""

    values: Tensor
    sink: Tensor | None
    slope: Tensor | None


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: PlainSettings
) -> Tensor:
    """Return attention (B, H, T, Dv) of one row.

    query: (B, H, T, D). key: (B, G, S, D). value: (B, G, S, Dv). T < S means that the first S - T
    keys come from a cache. sinks: (H,), a score without a value for each head.
    """
    out: Tensor = _PlainAttention.apply(query, key, value, sinks, settings)
    return out


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        settings: PlainSettings,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.settings = settings
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        grouped, grouped_out = _grouped(query, key), _grouped(out, key)
        for chunk in _chunks(query, key, settings):
            p = _probabilities(grouped, key, sinks, chunk, settings).values.to(value.dtype)
            grouped_out[..., chunk.queries, :] = p @ value[:, :, None, chunk.keys]
            del p
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        settings: PlainSettings = ctx.settings
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            grad_sinks = torch.zeros(sinks.shape, dtype=torch.float32, device=sinks.device)
        grouped, grouped_grad = _grouped(query, key), _grouped(grad.contiguous(), key)
        for chunk in _chunks(query, key, settings):
            p = _probabilities(grouped, key, sinks, chunk, settings)
            grad_out = grouped_grad[..., chunk.queries, :]
            _add_gradients(grads, grad_sinks, grouped, key, value, grad_out, p, chunk, settings)
            del p
        return (*grads, None if grad_sinks is None else grad_sinks.to(sinks.dtype), None)


def _add_gradients(
    grads: list[Tensor],
    grad_sinks: Tensor | None,
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    p: _Probabilities,
    chunk: _Chunk,
    settings: PlainSettings,
) -> None:
    """Add the gradients of one chunk to those of query, key, value and sinks.

    grouped: queries (B, G, R, T, D). grad_out: (B, G, R, c, Dv).
    """
    grad_query, grad_key, grad_value = grads
    grad_value[:, :, chunk.keys] += (p.values.to(value.dtype).mT @ grad_out).sum(dim=2)
    grad_p = (grad_out @ value[:, :, None, chunk.keys].mT).float()
    mean = (grad_p * p.values).sum(dim=-1, keepdim=True)
    if grad_sinks is not None:
        assert p.sink is not None
        grad_sinks -= (p.sink * mean).sum(dim=(0, 3, 4)).flatten()
    grad_scores = grad_p.sub_(mean).mul_(p.values)
    if p.slope is not None:
        grad_scores.mul_(p.slope)
    grad_product = grad_scores.mul_(settings.scaling).to(grouped.dtype)
    del grad_scores, grad_p
    _grouped(grad_query, key)[..., chunk.queries, :] = grad_product @ key[:, :, None, chunk.keys]
    queries = grouped[..., chunk.queries, :]
    grad_key[:, :, chunk.keys] += (grad_product.mT @ queries).sum(dim=2)


def _probabilities(
    grouped: Tensor, key: Tensor, sinks: Tensor | None, chunk: _Chunk, settings: PlainSettings
) -> _Probabilities:
    """Return the probabilities of one chunk. grouped: queries (B, G, R, T, D)."""
    product = grouped[..., chunk.queries, :] @ key[:, :, None, chunk.keys].mT
    scores = product.float().mul_(settings.scaling)
    del product
    slope = None
    if settings.cap is not None:
        scores.div_(settings.cap).tanh_()
        slope = scores.square().neg_().add_(1)
        scores.mul_(settings.cap)
    scores.masked_fill_(~chunk.visible, float("-inf"))
    if sinks is None:
        return _Probabilities(torch.softmax(scores, dim=-1), None, slope)
    sink = sinks.float().view(1, *grouped.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    values = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)
    return _Probabilities(values[..., :-1], values[..., -1:], slope)


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """View (B, H, T, D) as (B, G, R, T, D)."""
    batch, heads, length, size = tensor.shape
    groups = key.shape[1]
    return tensor.view(batch, groups, heads // groups, length, size)


def _chunks(query: Tensor, key: Tensor, settings: PlainSettings) -> Iterator[_Chunk]:
    """Yield chunks of queries, the last ones first. The last query is at the last key's position.

    Earlier queries attend to fewer keys, so the memory of the first chunks suffices for the others:
    on meta, where only memory matters, the others are left out.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    offset = num_keys - num_queries
    size = max(1, CHUNK_ELEMENTS // (query.shape[0] * query.shape[1] * num_keys))
    starts = range(0, num_queries, size)[::-1]
    run = starts[:_CHUNKS_ON_META] if query.is_meta else starts
    for start in run:
        stop = min(start + size, num_queries)
        first = 0
        if settings.window is not None:
            first = max(0, offset + start - settings.window + 1)
        positions = torch.arange(offset + start, offset + stop, device=query.device)[:, None]
        keys = torch.arange(first, offset + stop, device=query.device)
        visible = keys <= positions
        if settings.window is not None:
            visible &= keys > positions - settings.window
        chunk = _Chunk(slice(start, stop), slice(first, offset + stop), visible)
        if len(run) == len(starts):
            yield chunk
            continue
        # Without a window the chunks that are left out have half of the keys on average.
        others = (len(starts) - len(run)) / (1 if settings.window is not None else 2)
        with represents(1 + others / len(run)):
            yield chunk
