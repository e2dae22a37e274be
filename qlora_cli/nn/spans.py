"""The rows of a sequence without padding, and how attention learns of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.memory.scopes import recomputing

Kernel = Literal["varlen", "efficient", "cpu"]
"""varlen: FlashAttention over all rows. efficient: SDPA's memory-efficient kernel, one call per
row. cpu: SDPA's FlashAttention for CPUs, one call per row."""


@dataclass(frozen=True)
class Spans:
    """The rows of a sequence without padding.

    lengths: tokens of each row, in order. kernel: the device's attention kernel. offsets: first
    token of each row and the end, (rows + 1,) int32 on the device; None unless kernel is varlen.
    """

    lengths: tuple[int, ...]
    kernel: Kernel
    offsets: Tensor | None = None

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest row."""
        return max(self.lengths)

    @classmethod
    def on(cls, lengths: tuple[int, ...], device: torch.device, kernel: Kernel) -> Spans:
        """Create the spans of rows of these lengths, with offsets if the kernel needs them."""
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

    def in_chunks(self, size: int, device: torch.device) -> Spans:
        """Return spans in which each chunk of `size` tokens of a row is a row of its own."""
        starts = ((length, start) for length in self.lengths for start in range(0, length, size))
        lengths = tuple(min(size, length - start) for length, start in starts)
        return Spans.on(lengths, device, self.kernel)


def first_visible_key(num_queries: int, num_keys: int, size: int) -> int:
    """Return the first key of the chunk of the last tokens; 0 if no keys come from a cache.

    size: of the chunks of a row, which attend to themselves only. Raises ModelError if tokens after
    cached ones are in several chunks.
    """
    if num_queries == num_keys:
        return 0
    first = (num_keys - 1) // size * size
    if num_keys - num_queries < first:
        raise ModelError("several tokens after cached ones cross the limit of a chunk")
    return first


_CURRENT: ContextVar[Spans | None] = ContextVar("spans", default=None)


class use_spans(AbstractContextManager[None]):  # noqa: N801
    """Let every attention inside the block compute the rows of `spans`.

    A context and not an argument, because some models do not pass arguments on to the attention.
    """

    def __init__(self, spans: Spans | None) -> None:
        self._spans = spans
        self._tokens: list[Token[Spans | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_CURRENT.set(self._spans))

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._tokens.pop())


def current_spans() -> Spans | None:
    """Return the spans of the innermost `use_spans`; None, for one row, outside of it."""
    return _CURRENT.get()


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's forward pass and of its recomputation, with equal spans."""
    return nullcontext(), _Recomputation(_CURRENT.get())


class _Recomputation(AbstractContextManager[None]):
    """The context of a recomputed block; it can be entered again."""

    def __init__(self, spans: Spans | None) -> None:
        self._spans = spans
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(use_spans(self._spans))
        stack.enter_context(recomputing())
        self._entered.append(stack)

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)
