"""Trained keys and values before those of every row (prefix-tuning, Li and Liang 2021).

A `BlockPrefix` is a submodule of transformers' attention, and `attend` looks for it there. The
prefix has the first N positions, so the tokens of a row begin at position N, as after N cached
tokens. Its keys are not rotated.

Each row gets the keys and values of the prefix, and N queries that are zero. Queries and keys then
have the same length, so each attention kernel computes the row as usual, causally and without a
mask. The outputs of these queries are dropped.

Letters: B batch, H heads, G key/value heads, T query and S key positions, D head size, N length of
the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_cli.errors import ModelError
from qlora_cli.nn.spans import Spans

SUBMODULE = "prefix"
"""Name of the prefix in the attention's module."""
_STD = 0.02
"""Standard deviation of the first values. Values near zero change the hidden states little."""


class BlockPrefix(nn.Module):
    """The keys and values of one block, each (N, G, D).

    is_active: whether `attend` uses them. is_switched: whether they are turned off while the model
    has no adapter; those of a merged model are not.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key = nn.Parameter(key)
        self.value = nn.Parameter(value)
        self.is_active = self.is_switched = True

    @classmethod
    def drawn(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> BlockPrefix:
        """Draw keys and values from N(0, 0.02^2). shape: (N, G, D). generator: on the CPU."""
        if device.type == "meta":
            return cls(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
        drawn = (torch.randn(shape, generator=generator) * _STD for _ in range(2))
        return cls(*(tensor.to(device, dtype) for tensor in drawn))

    @property
    def length(self) -> int:
        """Return N."""
        return self.key.shape[0]

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prefix as keys and values (B, G, N, D), in the dtype of a row's `key`."""
        own = (
            parameter.to(row.dtype).transpose(0, 1).expand(row.shape[0], -1, -1, -1)
            for parameter, row in ((self.key, key), (self.value, value))
        )
        return next(own), next(own)


def prefix_of(module: nn.Module) -> BlockPrefix | None:
    """Return the active prefix of an attention, or None."""
    prefix = module._modules.get(SUBMODULE)
    return prefix if isinstance(prefix, BlockPrefix) and prefix.is_active else None


def check_window(window: int | None, num_tokens: int, length: int) -> None:
    """Raise ModelError if a sliding window hides a part of the prefix from a row.

    num_tokens: of the longest row. length: N.
    """
    if window is not None and num_tokens + length > window:
        raise ModelError(
            f"a row of {num_tokens:,} tokens and the prefix of {length:,} are longer than the "
            f"sliding window of {window:,} tokens",
            where="adapter.prefix",
            hint="use shorter rows (data.seq_len), or omit adapter.prefix",
        )


@dataclass(frozen=True)
class PrefixedRows:
    """The arguments of an attention call after the prefix was added to its rows.

    lengths: tokens of each row without the prefix; None if all outputs are those of tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    spans: Spans | None
    lengths: tuple[int, ...] | None

    def kept(self, output: Tensor, length: int) -> Tensor:
        """Return the outputs (B, T, H, D) of the rows' own tokens. length: N."""
        if self.lengths is None:
            return output
        sizes = [size for own in self.lengths for size in (length, own)]
        parts = output.split(sizes, dim=1)[1::2]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)


def add_prefix(
    prefix: BlockPrefix, query: Tensor, key: Tensor, value: Tensor, spans: Spans | None
) -> PrefixedRows:
    """Add the keys and values of a prefix to every row.

    query (B, H, T, D), key and value (B, G, S, D). T < S: the first keys come from a cache, and
    the queries remain as they are.
    """
    own_key, own_value = prefix.keys_and_values(key, value)
    if query.shape[2] != key.shape[2]:
        keys, values = torch.cat([own_key, key], dim=2), torch.cat([own_value, value], dim=2)
        return PrefixedRows(query, keys, values, spans, None)
    lengths = (query.shape[2],) if spans is None else spans.lengths
    zeros = query.new_zeros((*query.shape[:2], prefix.length, query.shape[3]))
    query = _before_each(zeros, query, lengths)
    key, value = _before_each(own_key, key, lengths), _before_each(own_value, value, lengths)
    if spans is not None:
        longer = tuple(length + prefix.length for length in lengths)
        spans = Spans.on(longer, query.device, spans.kernel)
    return PrefixedRows(query, key, value, spans, lengths)


def _before_each(start: Tensor, rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return the rows (B, G, S, D) with `start` (B, G, N, D) before each of them."""
    parts = [part for row in rows.split(lengths, dim=2) for part in (start, row)]
    return torch.cat(parts, dim=2)
