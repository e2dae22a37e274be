"""Adapter layers in sequence (Houlsby et al. 2019), for comparison only.

Each block gets two: h + up(gelu(down(h))) on the output of its attention and of its MLP, before the
residual sum. They cannot be merged, so every token passes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class HoulsbyAdapter(nn.Module):
    """A bottleneck with a residual sum; new, it changes nothing, because `up` is zero."""

    def __init__(self, width: int, bottleneck: int) -> None:
        """Make the two linears. width: values of a token. bottleneck: values between them."""
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.normal_(self.down.weight, std=0.01)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the adapted values. hidden: (..., width)."""
        return hidden + self.up(functional.gelu(self.down(hidden)))


class SequentialAdapters:
    """Adapters behind modules of a model, which are there between `insert` and `remove`.

    modules: their outputs are adapted; a module may return a tuple whose first item is the output.
    """

    def __init__(self, modules: Sequence[nn.Module], width: int, bottleneck: int) -> None:
        self._modules = list(modules)
        self.layers = nn.ModuleList(HoulsbyAdapter(width, bottleneck) for _ in modules)
        self._hooks: list[Any] = []

    def insert(self) -> None:
        """Adapt the outputs from now on."""
        self.remove()
        for module, layer in zip(self._modules, self.layers, strict=True):
            self._hooks.append(module.register_forward_hook(_hook(layer)))

    def remove(self) -> None:
        """Leave the outputs as they are from now on."""
        while self._hooks:
            self._hooks.pop().remove()

    def num_parameters(self) -> int:
        """Return the number of parameters of all adapters."""
        return sum(parameter.numel() for parameter in self.layers.parameters())


def _hook(layer: nn.Module) -> Any:
    def adapt(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return layer(output)
        return (layer(output[0]), *output[1:])

    return adapt
