"""A model as this package holds it: transformers' modules with ours in their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora_cli.families.spec import Family
from qlora_cli.nn import attention, surgery
from qlora_cli.nn.quant import Format


@dataclass
class Built:
    """A model ready to train or to answer.

    sites: every linear the family knows. adapted: path -> roles with an adapter. kernel: of
    attention; a plan sets that of the device which it imagines.
    """

    model: Any
    family: Family
    config: Any
    sites: list[surgery.Site]
    adapted: dict[str, list[str]]
    held: Format
    kernel: attention.Kernel

    @property
    def head(self) -> nn.Module:
        """The module whose weight (V, d) turns hidden states into logits."""
        return self.model.get_submodule(self.family.head)  # type: ignore[no-any-return]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of what the optimizer moves."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def is_tied(built: Built) -> bool:
    """Whether table and head are one parameter."""
    return bool(getattr(built.config, "tie_word_embeddings", False))
