"""Checks that this package computes what the modules compute that it replaces.

A replaced module loses everything that its replacement does not have: Gemma 3 scales its embedding,
Gemma adds 1 to the weights of its norms, Cohere scales its logits. So each module is compared with
what its replacement handles: class, attributes, parameters, buffers, children and hooks. A norm or
an MLP is also computed once on small inputs, because each architecture has its own class for it.
Everything else is refused with a ModelError that names the class and the attribute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.nn.mlp import Activation, Mlp, Projections
from qlora_cli.nn.norm import RmsNorm

_MODULE_STATE = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}
"""Attributes of every module: torch's bookkeeping and transformers' mark of initialized modules."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ANY = object()
"""An attribute that may have any value."""
_EMBEDDING = {
    "num_embeddings": _ANY,
    "embedding_dim": _ANY,
    # Excludes a row from training; the table is frozen.
    "padding_idx": _ANY,
    "max_norm": None,
    "norm_type": _ANY,
    "scale_grad_by_freq": False,
    "sparse": False,
    "embed_scale": 1.0,
}
_LINEAR = {"in_features": _ANY, "out_features": _ANY, "nx": _ANY, "nf": _ANY}
_NORM = {"variance_epsilon": _ANY}
_MLP = {
    "config": _ANY,
    "hidden_size": _ANY,
    "intermediate_size": _ANY,
    "act_fn": _ANY,
    "act": _ANY,
}
_LOGIT_SETTINGS = {
    "final_logit_softcapping": None,
    "output_logit_soft_cap": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
}
"""Config keys with which architectures change the logits after the head; the neutral values."""
_TOLERANCE = 1e-4
"""transformers' gelu_new differs from torch's kernel by 1e-6."""


def check_logits(config: Any) -> None:
    """Raise ModelError if a model of a hand-written family changes its logits after the head.

    The loss is computed from the hidden states and the weight of the head, in chunks, so it would
    ignore the change. A derived family measures it (`models/head.py`).
    """
    for key, neutral in _LOGIT_SETTINGS.items():
        value = getattr(config, key, None)
        if value is not None and value != neutral:
            raise ModelError(
                f"{type(config).__name__} sets {key} to {value}, which changes the logits; its "
                "hand-written family does not support it",
                where="model.name",
            )


def check_linear(module: nn.Module, path: str) -> None:
    """Raise ModelError unless `module` computes what nn.Linear or transformers' Conv1D does."""
    _check(module, path, _LINEAR, parameters={"weight", "bias"})
    if not _computes_linear(module):
        _check_forward(module, path, (nn.Linear.forward, Conv1D.forward))


def _computes_linear(module: nn.Module) -> bool:
    """Return whether nn.Linear, or a subclass on a small weight, computes x W^T + b."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module) is nn.Linear and "forward" not in vars(module):
        return True
    weight, bias, x = _values(5, 3), _values(5), _values(4, 3)
    toy = copy.copy(module)
    toy.__dict__["in_features"], toy.__dict__["out_features"] = 3, 5
    parameters = {"weight": weight, "bias": None if module.bias is None else bias}
    toy.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(value, requires_grad=False)
        for name, value in parameters.items()
    }
    with torch.no_grad():
        found = toy(x)
    return torch.allclose(found, functional.linear(x, weight, parameters["bias"]), atol=1e-6)


def check_embedding(module: nn.Module, path: str) -> None:
    """Raise ModelError unless `module` is a plain nn.Embedding, or one with a factor of 1."""
    _check(module, path, _EMBEDDING, parameters={"weight"})
    if getattr(module, "embed_scale", None) is None or not _computes_rows(module):
        _check_forward(module, path, (nn.Embedding.forward,))


def _computes_rows(module: nn.Module) -> bool:
    """Return whether a subclass of nn.Embedding returns rows of its weight, on a small weight."""
    toy = copy.copy(module)
    weight = _values(4, 3)
    toy.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    with torch.no_grad():
        return torch.equal(toy(torch.tensor([2, 1], device="cpu")), weight[[2, 1]])


def check_norm(module: nn.Module, path: str) -> None:
    """Raise ModelError unless `module` computes weight * x / sqrt(mean(x^2) + epsilon)."""
    _check(module, path, _NORM, parameters={"weight"})
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        raise _refusal(module, path, ["no weight or no variance_epsilon"])
    size = weight.shape[0]
    weight = nn.Parameter(_values(size).abs() + 0.5, requires_grad=False)
    x = _values(3, size)
    with torch.no_grad():
        expected = torch.func.functional_call(module, {"weight": weight}, (x,))
        computed = RmsNorm(weight, epsilon)(x)
    _check_equal(module, path, computed, expected)


def check_mlp(
    module: nn.Module, path: str, projections: Projections, activation: Activation
) -> None:
    """Raise ModelError unless `module` computes what `Mlp` computes over the same linears."""
    children = {
        name: child
        for name, child in module.named_children()
        if name not in projections.names and not _is_stateless(child)
    }
    _check(module, path, _MLP, children=children)
    toy = copy.copy(module)
    toy.__dict__["_modules"] = dict(module._modules)
    for name in projections.names:
        sizes = (3, 5) if name == projections.down else (5, 3)
        toy._modules[name] = _ToyLinear(_values(*sizes))
    x = _values(4, 3)
    with torch.no_grad():
        _check_equal(module, path, Mlp(toy, projections, activation)(x), toy(x))


class _ToyLinear(nn.Module):
    """A small linear on the CPU, with a fixed weight (out, in)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


def _values(*shape: int) -> Tensor:
    """Return fixed float32 values between -2 and 2 on the CPU; no random generator is used."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32, device="cpu") * 1.7).sin().view(shape) * 2


def _is_stateless(module: nn.Module) -> bool:
    """Return whether a child has no tensors and drops nothing (activation, unused dropout)."""
    has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
    return not has_tensors and getattr(module, "p", 0.0) == 0.0


def _check(
    module: nn.Module,
    path: str,
    attributes: Mapping[str, Any],
    parameters: Iterable[str] = (),
    children: Iterable[str] | None = None,
) -> None:
    """Raise ModelError that names everything in `module` that is not handled.

    attributes: handled attributes with their supported value. parameters: handled parameters.
    children: names of the children that are not handled, all of them if not given.
    """
    found = [
        f"attribute {name}"
        for name, value in vars(module).items()
        if name not in _MODULE_STATE and not _is_handled(attributes, name, value)
    ]
    found += [f"parameter {name}" for name in module._parameters if name not in set(parameters)]
    found += [f"buffer {name}" for name in module._buffers]
    found += [f"module {name}" for name in (module._modules if children is None else children)]
    found += [f"hook in {name}" for name in _HOOKS if getattr(module, name, None)]
    if found:
        raise _refusal(module, path, found)


def _is_handled(attributes: Mapping[str, Any], name: str, value: Any) -> bool:
    return name in attributes and (attributes[name] is _ANY or attributes[name] == value)


def _check_forward(module: nn.Module, path: str, forwards: tuple[Callable[..., Any], ...]) -> None:
    if type(module).forward not in forwards:
        raise _refusal(module, path, ["a forward method of its own"])


def _check_equal(module: nn.Module, path: str, computed: Tensor, expected: Tensor) -> None:
    if not torch.allclose(computed, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise _refusal(module, path, ["a forward method that computes something else"])


def _refusal(module: nn.Module, path: str, found: list[str]) -> ModelError:
    return ModelError(
        f"{path}: {type(module).__name__} has {', '.join(found)}, which this package does not "
        "support",
        where="model.name",
        hint="support it in the layer that replaces the module (qlora_cli/nn/) and in "
        "qlora_cli/models/coverage.py, with a test against transformers",
    )
