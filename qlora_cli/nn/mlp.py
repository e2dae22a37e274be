"""A block's MLP that keeps its projections and not what follows from them.

    with a gate:  y = down(act(gate(x)) * up(x))      (SwiGLU: Llama and its like)
    without:      y = down(act(up(x)))                (GPT-2)

Composed of modules, act's output, the product and whatever an activation written in Python leaves
on its way stay alive until backward: 4 to 5 tensors as wide as the MLP, its widest. Here backward
computes them again from the projections' outputs, which costs one activation and one product of
each value. transformers' gelu_new is written in Python; here it is torch's one kernel, equal to
1e-6 in float32.

Shapes: x (tokens, d), gate and up (tokens, f), y (tokens, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_cli.nn.lora_matmul import AdaptedLinear, LoraMatmul
from qlora_cli.nn.quant import QuantLinear

CHUNK_ELEMENTS = 2**22
"""Values whose gradients are made at once: two temporaries of 8 MiB each in 16 bit."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An element-wise function and its gradient: `gradient(grad, x, grad_input=out)`."""

    forward: Callable[[Tensor], Tensor]
    gradient: Callable[..., Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(functional.gelu, approximate=approximate),
        partial(_aten.gelu_backward.grad_input, approximate=approximate),
    )


ACTIVATIONS = {
    "silu": Activation(functional.silu, _aten.silu_backward.grad_input),
    "gelu": _gelu("none"),
    "gelu_new": _gelu("tanh"),
    "gelu_pytorch_tanh": _gelu("tanh"),
}
"""By the name that a transformers config gives; a model with another one keeps its own MLP."""


@dataclass(frozen=True)
class Projections:
    """Names of an MLP's linears. gate: None where there is none."""

    gate: str | None
    up: str
    down: str


class Mlp(nn.Module):
    """Takes over the linears of transformers' MLP under their names."""

    def __init__(self, old: nn.Module, names: Projections, activation: Activation) -> None:
        super().__init__()
        self.names = names
        self.activation = activation
        for name in (names.gate, names.up, names.down):
            if name is not None:
                self.add_module(name, old.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d); differentiable in x and in every adapter."""
        if not torch.is_grad_enabled():
            return self._answer(x)
        gate: Tensor | None = None
        if self.names.gate is not None:
            gate = self.get_submodule(self.names.gate)(x)
        up: Tensor = self.get_submodule(self.names.up)(x)
        down = self.get_submodule(self.names.down)
        assert isinstance(down, AdaptedLinear | QuantLinear)
        product, factors = (
            down.begin() if isinstance(down, AdaptedLinear) else (LoraMatmul(down), [])
        )
        flat = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (gate, up))
        y: Tensor = _DownProduct.apply(self.activation, product, *flat, *factors)
        return y.view(*x.shape[:-1], product.base.out_features)

    def _answer(self, x: Tensor) -> Tensor:
        """The same where nothing goes back: what a projection made is gone before the next."""
        names = self.names
        inner = self.activation.forward(self.get_submodule(names.gate or names.up)(x))
        if names.gate is not None:
            inner.mul_(self.get_submodule(names.up)(x))
        y: Tensor = self.get_submodule(names.down)(inner)
        return y


class _DownProduct(torch.autograd.Function):
    """down's product with an input that backward computes again."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        product: LoraMatmul,
        gate: Tensor | None,
        up: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        y, narrow = product.forward(_activated(activation, gate, up), factors)
        ctx.save_for_backward(gate, up, *narrow, *factors)
        ctx.activation, ctx.product = activation, product
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product: LoraMatmul = ctx.product
        gate, up, *saved = ctx.saved_tensors
        narrow, factors = saved[: len(product.rows)], saved[len(product.rows) :]
        grad_narrow = product.grad_narrow(grad, factors)
        grads: list[Tensor] = []
        if factors:
            # Gone before the gradient of the same size is made.
            x = _activated(ctx.activation, gate, up)
            grads = product.grad_factors(x, grad, narrow, grad_narrow, factors)
            del x
        if not any(ctx.needs_input_grad[2:4]):
            return (None, None, None, None, *grads)
        grad_x = product.grad_input(grad, grad_narrow, factors)
        return (None, None, *_through(ctx.activation, grad_x, gate, up), *grads)


def _activated(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """down's input (tokens, f)."""
    return activation.forward(up) if gate is None else activation.forward(gate).mul_(up)


def _through(
    activation: Activation, grad: Tensor, gate: Tensor | None, up: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The gradients of gate and up, from that of down's input, made in the places of grad and up.

    Overwriting is safe: nothing else holds either (a projection keeps its input, not its output),
    and a second backward through the same graph is an error of torch's own, not a wrong gradient.
    """
    if gate is None:
        activation.gradient(grad, up, grad_input=grad)
        return None, grad
    up = up.detach()
    for part_grad, part_gate, part_up in _rows(grad, gate.detach(), up):
        of_product = part_grad * part_up
        torch.mul(part_grad, activation.forward(part_gate), out=part_up)
        activation.gradient(of_product, part_gate, grad_input=part_grad)
    return grad, up


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, a chunk at a time."""
    num_rows = max(1, CHUNK_ELEMENTS // tensors[0].shape[1])
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)
