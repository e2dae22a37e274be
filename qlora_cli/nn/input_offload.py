"""Keeps the inputs of recomputed blocks in host memory between the forward and the backward pass.

A recomputed block keeps only its input. For an 8B model and 2,048 tokens that is 16 MiB for each of
32 blocks. Here the input is copied to pinned host memory while the block computes, on a stream of
its own, and copied back while the block after it runs its backward pass. Three inputs are on the
device at any time at most. The copies change no bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_cli.memory.scopes import host_memory


class _Stored:
    """An input in host memory. device_copy: on the device, if it is still or again there."""

    def __init__(self, host: Tensor, device_copy: Tensor) -> None:
        self.host = host
        self.device_copy: Tensor | None = device_copy
        self.device = device_copy.device
        self.copied: Any = None
        """Event after the last copy; None without a stream."""


class InputOffload:
    """Stores inputs in the order of the blocks and returns them in the opposite order."""

    def __init__(self) -> None:
        self._order: list[weakref.ref[_Stored]] = []
        self._latest: weakref.ref[_Stored] | None = None
        self._stream: Any = None
        self.copied_bytes = 0
        """Bytes that were copied to the host and back."""

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Store the tensors that a checkpoint saves as its inputs inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._store, self._returned):
            yield

    def _store(self, x: Tensor) -> _Stored:
        self._release()
        with host_memory():
            device = "meta" if x.is_meta else "cpu"
            host = torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=x.is_cuda)
        stored = _Stored(host, x.detach())
        self._copy(host, x, stored)
        self._order = [at for at in self._order if at() is not None]
        self._latest = weakref.ref(stored)
        self._order.append(self._latest)
        return stored

    def _release(self) -> None:
        """Free the input of the block before on the device, after it was copied."""
        stored = self._latest() if self._latest is not None else None
        self._latest = None
        if stored is not None:
            self._wait(stored)
            stored.device_copy = None

    def _returned(self, stored: _Stored) -> Tensor:
        self._order = [at for at in self._order if at() not in (None, stored)]
        self._latest = None
        if stored.device_copy is None:
            self._fetch(stored)
        before = self._order[-1]() if self._order else None
        if before is not None and before.device_copy is None:
            self._fetch(before)
        self._wait(stored)
        x, stored.device_copy = stored.device_copy, None
        assert x is not None
        return x

    def _fetch(self, stored: _Stored) -> None:
        """Begin to copy an input back to the device."""
        x = torch.empty_like(stored.host, device=stored.device)
        self._copy(x, stored.host, stored)
        stored.device_copy = x

    def _copy(self, target: Tensor, source: Tensor, stored: _Stored) -> None:
        self.copied_bytes += source.numel() * source.element_size()
        if target.is_meta:
            return
        if stored.device.type != "cuda":
            target.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(stored.device)
        # The source was computed, and the target's memory used before, on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(stored.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        stored.copied = self._stream.record_event()

    @staticmethod
    def _wait(stored: _Stored) -> None:
        """Let the current stream wait for the last copy, so that memory can be used again."""
        if stored.copied is not None:
            torch.cuda.current_stream(stored.device).wait_event(stored.copied)
            stored.copied = None
