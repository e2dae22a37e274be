"""A checkpoint without bytes: the weight source of a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.models.family import Family


class MetaSource:
    """The checkpoint of a model that was just made on meta: shapes and dtypes, no bytes."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if getattr(model.config, "tie_word_embeddings", False):
            self._shapes.pop(f"{family.head}.weight", None)
        self._dtype = dtype

    def names(self) -> Sequence[str]:
        """In the model's order."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As it would lie in the file."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """An empty tensor on meta."""
        return torch.empty(self._shapes[name], dtype=self._dtype, device="meta")
