"""Finds the LoRA modules of a model: adapted linears and adapted stacks of experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.adapters.lora_experts import LoraStack

LoraModule = LoraLinear | LoraStack


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, LoraModule]]:
    """Yield (path, module) of every LoRA module, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear | LoraStack):
            yield path, module


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (path, layer) of every adapted linear, in the model's order."""
    for path, module in adapted_modules(model):
        if isinstance(module, LoraLinear):
            yield path, module


def adapted_stacks(model: nn.Module) -> Iterator[tuple[str, LoraStack]]:
    """Yield (path of the parameter, module) of every adapted stack of experts."""
    for path, module in adapted_modules(model):
        if isinstance(module, LoraStack):
            yield path, module
