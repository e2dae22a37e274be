"""Queries, keys and values: projected in one product, and rotated by one function.

transformers' attention calls three projections with the same tensor, one after the other. Here the
first part of its forward pass is done before it starts: the outputs of all three are computed
together (`lora_product.py`), and each projection then returns its own. The rest of the forward pass
is the model's own code, with another function for rotary positions (`rotary.py`).
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.nn.lora_product import joined, lora_product
from qlora_cli.nn.rotary import rotate, rotates_halves

_ROTATION = "apply_rotary_pos_emb"
"""Name of the function in the file of a model's attention."""


def share_input(attention: nn.Module, projections: Sequence[str]) -> None:
    """Let the projections of an attention module compute their outputs together.

    attention: a module whose forward method calls each projection once with `hidden_states`.
    projections: names of its linears. Without gradients, and if the linears cannot be computed
    together, nothing changes.
    """
    # If the module referred to itself, only garbage collection would free it.
    reference, forward = weakref.ref(attention), _with_own_rotation(type(attention).forward)

    def forward_together(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        living = reference()
        assert living is not None
        linears = [living.get_submodule(name) for name in projections]
        with _projected(linears, hidden_states):
            return forward(living, hidden_states, *args, **kwargs)

    attention.forward = forward_together


@contextmanager
def _projected(linears: Sequence[nn.Module], x: Tensor) -> Iterator[None]:
    """Let each linear return its output for x (..., in) inside the block."""
    call = joined(linears) if torch.is_grad_enabled() else None
    if call is None:
        yield
        return
    outputs = [y.view(*x.shape[:-1], -1) for y in lora_product(x, *call)]
    for linear in linears:
        linear.forward = _Answer(x, outputs.pop(0))
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


class _Answer:
    """Returns the output of a linear that was computed before, once, and then forgets it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x = x
        self._outputs = [y]

    def __call__(self, x: Tensor) -> Tensor:
        assert x is self._x, "the projections have different inputs"
        return self._outputs.pop()


@cache
def _with_own_rotation(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward method that calls `rotate` for rotary positions if that is equal."""
    names = getattr(forward, "__globals__", {})
    if not rotates_halves(names.get(_ROTATION)):
        return forward
    own = types.FunctionType(
        forward.__code__,
        {**names, _ROTATION: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return own
