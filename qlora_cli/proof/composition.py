"""Puts W + sBA, or dequantized weights, into transformers' own small model inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.adapted_modules import adapted_layers, adapted_stacks
from qlora_cli.adapters.lora_experts import LoraStack
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.experts import Experts
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.proof.small_model import SmallModel


def stack_as_matrices(small: SmallModel, path: str, stack: Tensor) -> Tensor:
    """Return (E, out, in) of a stacked parameter of transformers, or the reverse."""
    owner: Any = small.reference.get_submodule(path.rpartition(".")[0])
    return stack.mT if owner.is_transposed else stack


@contextmanager
def composed_stacks(small: SmallModel, loaded: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """Put W + sBA of experts into transformers' model inside the block.

    Yields path -> stacked weight of transformers, with a gradient.
    """
    weights: dict[str, Tensor] = {}
    old: dict[str, nn.Parameter] = {}
    for path, stack in adapted_stacks(loaded.model):
        owner, _, name = path.rpartition(".")
        module = small.reference.get_submodule(owner)
        old[path] = module.get_parameter(name)
        delta = stack_as_matrices(small, path, stack_delta(stack))
        weights[path] = (old[path].detach() + delta).requires_grad_()
        del module._parameters[name]
        setattr(module, name, weights[path])
    try:
        yield weights
    finally:
        for path, parameter in old.items():
            owner, _, name = path.rpartition(".")
            module = small.reference.get_submodule(owner)
            delattr(module, name)
            module.register_parameter(name, parameter)


def stack_delta(stack: LoraStack) -> Tensor:
    """Return (E, out, in), what merging adds to the matrices of all experts."""
    return torch.stack([stack.delta(expert) for expert in range(stack.base.num_experts)])


@contextmanager
def composed_weights(small: SmallModel, loaded: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """Put W + sBA into transformers' model inside the block.

    Yields path -> weight (out, in) with a gradient.
    """
    modules = {
        path: [small.reference.get_submodule(other) for other in paths_of_weight(small, path)]
        for path, _ in adapted_layers(loaded.model)
    }
    old = {path: found[0].weight for path, found in modules.items()}
    weights: dict[str, Tensor] = {}
    for path, layer in adapted_layers(loaded.model):
        turned = isinstance(modules[path][0], Conv1D)
        plain = old[path].detach().t() if turned else old[path].detach()
        weight = (plain + layer.delta()).requires_grad_()
        weights[path] = weight
        for module in modules[path]:
            del module.weight
            module.weight = weight.t() if turned else weight
    try:
        yield weights
    finally:
        for path, found in modules.items():
            for module in found:
                del module.weight
                module.weight = old[path]


def paths_of_weight(small: SmallModel, path: str) -> list[str]:
    """Return the paths of transformers' modules that share the weight of the module at `path`."""
    weight = small.reference.get_submodule(path).weight
    modules = small.reference.named_modules(remove_duplicate=False)
    return [other for other, module in modules if getattr(module, "weight", None) is weight]


@contextmanager
def quantized_weights(small: SmallModel, layers: dict[str, QuantLinear]) -> Iterator[None]:
    """Put the dequantized weights of `layers` into transformers' model inside the block."""
    old = {path: small.reference.get_submodule(path).weight.detach().clone() for path in layers}
    try:
        for path, layer in layers.items():
            weight = layer.dequantize().float()
            target = small.reference.get_submodule(path)
            target.weight.data.copy_(weight.t() if isinstance(target, Conv1D) else weight)
        yield
    finally:
        for path, values in old.items():
            small.reference.get_submodule(path).weight.data.copy_(values)


@contextmanager
def quantized_stacks(small: SmallModel, loaded: LoadedModel) -> Iterator[None]:
    """Put the dequantized weights of experts into transformers' model inside the block."""
    old: dict[str, Tensor] = {}
    for path, module in loaded.model.named_modules():
        for name in module.stacks if isinstance(module, Experts) else ():
            target = small.reference.get_parameter(f"{path}.{name}")
            old[f"{path}.{name}"] = target.detach().clone()
            target.data.copy_(module.dequantized_stack(name))
    try:
        yield
    finally:
        for path, values in old.items():
            small.reference.get_parameter(path).data.copy_(values)
