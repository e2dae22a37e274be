"""Training of the head alone: a frozen base without adapters. For comparison with LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from qlora_cli.adapters.no_layers import NoLayers


@dataclass(frozen=True)
class HeadMethod(NoLayers):
    """The adapter method `head`: a classifier's head trains, as with every method, and no more."""

    name = "head"
    freezes_base = True

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield nothing: `models/build.py` trains the head of every classifier."""
        yield from ()
