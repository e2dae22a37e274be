"""A model as this package holds it: transformers' modules with ours in their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora_cli.models.family import Family
from qlora_cli.nn import attention
from qlora_cli.nn.quant import WeightFormat
from qlora_cli.nn.site import Site


@dataclass
class LoadedModel:
    """A model ready to train or to answer.

    sites: every linear the family knows. adapted: path -> roles with an adapter. kernel: of
    attention; a plan sets that of the device which it imagines.
    """

    model: Any
    family: Family
    config: Any
    sites: list[Site]
    adapted: dict[str, list[str]]
    weight_format: WeightFormat
    kernel: attention.Kernel

    @property
    def head(self) -> nn.Module:
        """The module whose weight (V, d) turns hidden states into logits."""
        return self.model.get_submodule(self.family.head)  # type: ignore[no-any-return]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of what the optimizer moves."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def is_tied(loaded: LoadedModel) -> bool:
    """Whether table and head are one parameter."""
    return bool(getattr(loaded.config, "tie_word_embeddings", False))
