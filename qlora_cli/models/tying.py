"""Parameters that are one tensor with several names, apart from a tied head's weight.

BERT's head has its bias under two names. A checkpoint contains one of them, or both. Blocks of
Zamba share linears and norms: one module, with one adapter, is a part of several blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from qlora_cli.errors import ModelError
from qlora_cli.files.source import TensorSource

_Value = TypeVar("_Value")


def tied_names(model: Any, head: str, others: Sequence[str]) -> dict[str, str]:
    """Return name -> other name of each parameter of transformers' `model` that has two names.

    head: path of the head, whose weight is left out. others: paths of modules that are not loaded.
    """
    names: Mapping[str, str] = model.all_tied_weights_keys
    ignored = tuple(f"{path}." for path in others)
    return {
        name: other
        for name, other in names.items()
        if name != f"{head}.weight" and not (ignored and name.startswith(ignored))
    }


def shared_modules(model: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """Return path -> other path of the modules that are one, because all their parameters are.

    tied: of `tied_names`.
    """
    found: dict[str, str] = {}
    for name, other in tied.items():
        path, other_path = name.rpartition(".")[0], other.rpartition(".")[0]
        module, source = model.get_submodule(path), model.get_submodule(other_path)
        names = [key for key, _ in module.named_parameters(recurse=False)]
        is_whole = all(tied.get(f"{path}.{key}") == f"{other_path}.{key}" for key in names)
        if type(module) is type(source) and is_whole and not module._modules:
            found[path] = other_path
    return found


def share_modules(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Put the module at each path of `shared` also at its other paths."""
    for path, other in shared.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, model.get_submodule(other))


def with_names_in_file(
    slots: Mapping[str, _Value], tied: Mapping[str, str], present: Collection[str]
) -> dict[str, _Value]:
    """Return `slots` without second names of parameters.

    slots: name of a tensor -> what receives it. present: the names in the checkpoint; if only the
    second name of a parameter is among them, its slot has this name.
    """
    second = {other: name for name, other in tied.items()}
    return {
        name if name in present else _present(second.get(name, name), name, present): slot
        for name, slot in slots.items()
        if name not in tied
    }


def _present(second: str, name: str, present: Collection[str]) -> str:
    return second if second in present else name


def share_tied(model: nn.Module, tied: Mapping[str, str], source: TensorSource) -> None:
    """Make each parameter with two names one object. source: of the weights that were loaded.

    Raises ModelError if the checkpoint contains different values under the two names.
    """
    for name, other in tied.items():
        parameter = model.get_parameter(other)
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, parameter)
        is_twice = name in source.names() and other in source.names()
        if (
            is_twice
            and not parameter.is_meta
            and not torch.equal(source.read(name), source.read(other))
        ):
            raise ModelError(
                f"{name} and {other} are one parameter, but the checkpoint contains different "
                "values for them",
                where="model.name",
            )
