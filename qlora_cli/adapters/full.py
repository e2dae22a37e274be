"""Full fine-tuning: no adapter, every parameter of the model trains. For comparison with LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from qlora_cli.adapters.no_layers import NoLayers


@dataclass(frozen=True)
class FullFineTuning(NoLayers):
    """The adapter method `full`: no layer is wrapped and nothing is merged."""

    name = "full"
    freezes_base = False

    def trained_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield every parameter."""
        yield from model.parameters()
