"""Creates the buffers of a model that no checkpoint contains, such as rotary frequencies.

A model on meta has buffers without values. transformers computes them in `_init_weights`, and for
some modules only in the constructor. Both are tried on a copy of the module; a buffer that neither
of them sets is reported, and nothing is guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_UNSET_INTEGER = -(2**15)


def persistent_buffers(module: nn.Module) -> Iterator[str]:
    """Yield the names of the buffers of `module` itself that a checkpoint contains."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name


def created_buffers(model: Any, module: nn.Module) -> dict[str, Tensor | None]:
    """Return name -> value, on the CPU, of the buffers of `module` itself that are on meta.

    model: transformers' model that contains the module. The value is None if it is not known how
    the buffer is created.
    """
    wanted = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
    if not wanted:
        return {}
    with torch.device("cpu"):
        values = _initialized(model, module)
        if any(values[name] is None for name in wanted):
            values |= _constructed(model, module)
    return {name: values.get(name) for name in wanted}


def _initialized(model: Any, module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers that `_init_weights` sets; the module's parameters stay as they are."""
    changed = copy.copy(module)
    parameters = {
        name: None if old is None else nn.Parameter(torch.empty_like(old, device="meta"), False)
        for name, old in module._parameters.items()
    }
    buffers = {name: _unset(buffer) for name, buffer in module._buffers.items()}
    changed.__dict__.update(_parameters=parameters, _buffers=buffers)
    try:
        with torch.no_grad():
            model._init_weights(changed)
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError):
        # A part of a module that another package has replaced, or that is on meta, may be read.
        pass
    return {
        name: None if buffer is None or _is_unset(buffer) else buffer
        for name, buffer in changed._buffers.items()
    }


def _constructed(model: Any, module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers that the constructor sets, for a module without parameters."""
    if any(True for _ in module.parameters()):
        return {}
    try:
        return dict(type(module)(model.config)._buffers)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return {}


def _unset(buffer: Tensor | None) -> Tensor | None:
    """Return a buffer whose values mark that nothing has set them."""
    if buffer is None:
        return None
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
