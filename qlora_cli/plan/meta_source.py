"""The weight sources of a dry run: shapes and dtypes, without bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.files.disk_tensor import DiskTensor
from qlora_cli.files.safetensors_io import TensorSpec
from qlora_cli.models.buffers import persistent_buffers
from qlora_cli.models.family import Family
from qlora_cli.models.placement.held import NamedTensors


class MetaSource:
    """The checkpoint of a model that was just created on meta.

    model: transformers' model on meta, before any module was replaced. dtype: of all tensors.
    """

    def __init__(self, model: Any, family: Family, dtype: torch.dtype) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=not family.tied):
            if name not in family.tied:
                self._shapes |= _shapes_in_file(name, tuple(parameter.shape), family)
        for path, module in model.named_modules():
            for name in persistent_buffers(module):
                self._shapes[f"{path}.{name}"] = tuple(module.get_buffer(name).shape)
        is_tied = f"{family.head}.weight" in model.all_tied_weights_keys
        if is_tied and not family.is_classifier:
            self._shapes.pop(f"{family.head}.weight", None)
        self._dtype = dtype

    def names(self) -> Sequence[str]:
        """Return the tensors' names, in the order of the model's parameters."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the tensor has in the checkpoint file."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Return an empty tensor on meta."""
        return torch.empty(self._shapes[name], dtype=self._dtype, device="meta")


class MetaCopy:
    """The packed copy of a base. exists: an earlier start has kept it."""

    def __init__(self, exists: bool = True) -> None:
        self._exists = exists

    def disk_tensors(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, DiskTensor] | None:
        """Return no tensor, because a dry run reads none; None if the copy does not exist."""
        return {} if self._exists else None

    def write(self, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Compute the tensors, one after the other as when they are written."""
        deque(tensors, maxlen=0)
        self._exists = True

    def read(self, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """Return empty tensors on meta."""
        return {
            name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            for name, spec in specs.items()
        }

    def finish(self, tensors: NamedTensors) -> None:
        """Do nothing: the copy exists."""


def _shapes_in_file(
    name: str, shape: tuple[int, ...], family: Family
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that a checkpoint stores for a parameter."""
    if row_parts := family.row_parts.get(name):
        sizes = [len(rows) for rows in torch.empty(shape[0], device="meta").chunk(len(row_parts))]
        return {part: (size, *shape[1:]) for part, size in zip(row_parts, sizes, strict=True)}
    parts = family.stacks.get(name)
    if parts is None:
        return {name: shape}
    _, rows, columns = shape
    return {part.name: (rows * (part.stop - part.start) // 2, columns) for part in parts}
