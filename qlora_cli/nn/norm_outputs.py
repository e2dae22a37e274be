"""Recomputes the outputs of norms in blocks that keep their tensors for the backward pass.

The linears after a norm save its output, and the norm saves its input. The output costs one pass
over the input and no matrix product, so a kept block saves the input alone. The backward pass
computes the output again, with equal bits, because a norm is deterministic. Of all tensors that a
kept block saves, these are the only ones that cost no matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_cli.nn.norm import RmsNorm

NORMS = (RmsNorm, nn.LayerNorm)
"""Classes whose output depends on nothing but their input and their parameters."""


@dataclass(frozen=True)
class _Kept:
    """A tensor that is saved as it is. version: its version counter when it was saved."""

    tensor: Tensor
    version: int

    def returned(self) -> Tensor:
        """Return the tensor. Raises RuntimeError if it was written to in the meantime."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that the backward pass needs was modified by an inplace operation: it "
                f"is at version {self.tensor._version}, expected version {self.version}"
            )
        return self.tensor


@dataclass(frozen=True)
class _Output:
    """An output of a norm. version: its version counter after the norm. x: the norm's input."""

    storage: StorageWeakRef
    version: int
    norm: nn.Module
    x: _Kept


@dataclass(frozen=True)
class _Recomputed:
    """A tensor of which only the norm's input is saved. size, stride, offset: of its view."""

    output: _Output
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def returned(self) -> Tensor:
        """Return the view of the output, computed again. Raises RuntimeError as `_Kept`."""
        norm = self.output.norm
        with torch.no_grad():
            # The hooks of the module are not called.
            y: Tensor = type(norm).forward(norm, self.output.x.returned())
        return y.as_strided(self.size, self.stride, self.offset)


class NormOutputs:
    """Saves the inputs of a block's norms in place of their outputs.

    block: its frozen norms get a hook, which does nothing outside of `recomputed`.
    """

    def __init__(self, block: nn.Module) -> None:
        self._outputs: list[_Output] = []
        self._is_active = False
        for module in block.modules():
            if isinstance(module, NORMS) and not any(p.requires_grad for p in module.parameters()):
                module.register_forward_hook(self._remember)

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """Save no output of a frozen norm for the backward pass while the context is active."""
        self._is_active = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, _returned):
                yield
        finally:
            self._is_active = False
            self._outputs = []

    def _remember(self, norm: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        if self._is_active and len(inputs) == 1:
            storage = StorageWeakRef(y.untyped_storage())
            self._outputs.append(_Output(storage, y._version, norm, _kept(inputs[0])))

    def _save(self, tensor: Tensor) -> _Kept | _Recomputed:
        # The weak references keep the numbers of freed storages from being used again.
        number = tensor.untyped_storage()._cdata
        for output in self._outputs:
            if output.storage.cdata == number and output.version == tensor._version:
                place = (tensor.size(), tensor.stride(), int(tensor.storage_offset()))
                return _Recomputed(output, *place)
        return _kept(tensor)


def _kept(tensor: Tensor) -> _Kept:
    # Without its history: a node that saved its own output would never be freed.
    return _Kept(tensor.detach(), tensor._version)


def _returned(saved: _Kept | _Recomputed) -> Tensor:
    return saved.returned()
