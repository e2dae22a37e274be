"""Creates the buffers of a model that no checkpoint contains, such as rotary frequencies.

A model on meta has buffers without values. transformers computes them in `_init_weights`, and for
some modules only in the constructor. Both are tried on a copy of the module; a buffer that neither
of them sets is reported, and nothing is guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.files.composed import text_config_of

_UNSET_INTEGER = -(2**15)


def persistent_buffers(module: nn.Module) -> Iterator[str]:
    """Yield the names of the buffers of `module` itself that a checkpoint contains."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name


def created_buffers(model: Any) -> dict[str, Tensor | None]:
    """Return path -> value, on the CPU, of every buffer of `model` that is on meta.

    model: transformers' model. The value is None if it is not known how the buffer is created.
    """
    wanted = [
        (path, name)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta
    ]
    if not wanted:
        return {}
    with torch.device("cpu"):
        initialized = _without_values(model, {})
        _initialize(initialized, initialized, {path for path, _ in wanted}, "")
        return {
            f"{path}.{name}": buffer
            if not _is_unset(buffer := initialized.get_submodule(path)._buffers[name])
            else _constructed(model, model.get_submodule(path)).get(name)
            for path, name in wanted
        }


def _without_values(module: nn.Module, done: dict[int, nn.Module]) -> Any:
    """Return a copy of a module tree with parameters on meta and buffers that nothing has set.

    done: id of a module -> its copy, because modules may be shared.
    """
    if id(module) in done:
        return done[id(module)]
    changed = done[id(module)] = copy.copy(module)
    parameters = {
        name: None if old is None else nn.Parameter(torch.empty_like(old, device="meta"), False)
        for name, old in module._parameters.items()
    }
    buffers = {
        name: _unset(buffer) if buffer is not None and buffer.is_meta else buffer
        for name, buffer in module._buffers.items()
    }
    children = {
        name: None if child is None else _without_values(child, done)
        for name, child in module._modules.items()
    }
    changed.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=children)
    return changed


def _initialize(module: nn.Module, owner: Any, wanted: Collection[str], path: str) -> None:
    """Let transformers initialize the modules at the paths `wanted` and those around them.

    owner: the model that the module at `path` belongs to.
    """
    owner = module if hasattr(module, "_init_weights") else owner
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        if any(f"{one}.".startswith(f"{inside}.") for one in wanted):
            _initialize(child, owner, wanted, inside)
    # A part of a module that another package has replaced, or that is on meta, may be read.
    errors = (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError)
    with suppress(*errors), torch.no_grad():
        owner._init_weights(module)


def _constructed(model: Any, module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers that the constructor sets, for a module without parameters."""
    if any(True for _ in module.parameters()):
        return {}
    with suppress(AttributeError, RuntimeError, TypeError, ValueError):
        return dict(type(module)(text_config_of(model))._buffers)
    return {}


def _unset(buffer: Tensor) -> Tensor:
    """Return a buffer whose values mark that nothing has set them."""
    if buffer.dtype == torch.bool:
        return torch.zeros(buffer.shape, dtype=buffer.dtype)
    value = float("nan") if buffer.is_floating_point() else _UNSET_INTEGER
    return torch.full(buffer.shape, value, dtype=buffer.dtype)


def _is_unset(buffer: Tensor) -> bool:
    if buffer.dtype == torch.bool:
        return not buffer.any()
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return bool((buffer == _UNSET_INTEGER).any())
