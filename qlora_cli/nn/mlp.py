"""The MLP of a block. It saves the outputs of its projections and recomputes the rest.

    with a gate:  y = down(act(gate(x)) * up(x))      (SwiGLU: Llama and similar models)
    without:      y = down(act(up(x)))                (GPT-2)

In a composition of modules, the output of act, the product and the intermediate tensors of an
activation written in Python stay alive until the backward pass: 4 to 5 tensors of the MLP's full
width. Here the backward pass recomputes them from the projections' outputs. This costs one
activation and one multiplication per value. transformers' gelu_new is written in Python; here it is
one kernel of torch, equal to 1e-6 in float32.

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
"""Values whose gradients are computed at once: two temporaries of 8 MiB each in 16 bit."""

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
"""By the name in a transformers config. A model with another activation keeps transformers' MLP."""


@dataclass(frozen=True)
class Projections:
    """Names of an MLP's linears. gate: None for an MLP without a gate."""

    gate: str | None
    up: str
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the linears that exist."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)


class Mlp(nn.Module):
    """An MLP over the linears of transformers' MLP, which keep their names."""

    def __init__(self, old: nn.Module, projections: Projections, activation: Activation) -> None:
        super().__init__()
        self.projections = projections
        self.activation = activation
        for name in projections.names:
            self.add_module(name, old.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d) to (..., d); differentiable in x and in every adapter."""
        if not torch.is_grad_enabled():
            return self._forward_without_grad(x)
        gate: Tensor | None = None
        if self.projections.gate is not None:
            gate = self.get_submodule(self.projections.gate)(x)
        up: Tensor = self.get_submodule(self.projections.up)(x)
        down = self.get_submodule(self.projections.down)
        assert isinstance(down, AdaptedLinear | QuantLinear)
        matmul, factors = (
            down.start_matmul() if isinstance(down, AdaptedLinear) else (LoraMatmul(down), [])
        )
        flat = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (gate, up))
        y: Tensor = _DownProduct.apply(self.activation, matmul, *flat, *factors)
        return y.view(*x.shape[:-1], matmul.base.out_features)

    def _forward_without_grad(self, x: Tensor) -> Tensor:
        """Free each intermediate tensor before the next one is computed."""
        names = self.projections
        inner = self.activation.forward(self.get_submodule(names.gate or names.up)(x))
        if names.gate is not None:
            inner.mul_(self.get_submodule(names.up)(x))
        y: Tensor = self.get_submodule(names.down)(inner)
        return y


class _DownProduct(torch.autograd.Function):
    """The product of down. The backward pass recomputes its input."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        matmul: LoraMatmul,
        gate: Tensor | None,
        up: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        y, lora_activations = matmul.forward(_down_input(activation, gate, up), factors)
        ctx.save_for_backward(gate, up, *lora_activations, *factors)
        ctx.activation, ctx.matmul = activation, matmul
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matmul: LoraMatmul = ctx.matmul
        gate, up, *saved = ctx.saved_tensors
        num_adapters = len(matmul.lora_slices)
        lora_activations, factors = saved[:num_adapters], saved[num_adapters:]
        grad_activations = matmul.grad_activations(grad, factors)
        grads: list[Tensor] = []
        if factors:
            # Freed before the gradient of the same size is allocated.
            x = _down_input(ctx.activation, gate, up)
            grads = matmul.grad_factors(x, grad, lora_activations, grad_activations, factors)
            del x
        if not any(ctx.needs_input_grad[2:4]):
            return (None, None, None, None, *grads)
        grad_x = matmul.grad_input(grad, grad_activations, factors)
        return (None, None, *_grad_gate_and_up(ctx.activation, grad_x, gate, up), *grads)


def _down_input(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return the input of down (tokens, f)."""
    return activation.forward(up) if gate is None else activation.forward(gate).mul_(up)


def _grad_gate_and_up(
    activation: Activation, grad: Tensor, gate: Tensor | None, up: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of gate and up. They overwrite `grad` and `up`.

    grad: gradient of the input of down. Overwriting is safe: nothing else uses these tensors,
    because a projection saves its input and not its output. A second backward pass through the same
    graph raises an error of torch and gives no wrong gradient.
    """
    if gate is None:
        activation.gradient(grad, up, grad_input=grad)
        return None, grad
    up = up.detach()
    for grad_chunk, gate_chunk, up_chunk in _chunks(grad, gate.detach(), up):
        grad_act = grad_chunk * up_chunk
        torch.mul(grad_chunk, activation.forward(gate_chunk), out=up_chunk)
        activation.gradient(grad_act, gate_chunk, grad_input=grad_chunk)
    return grad, up


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of each tensor, at most CHUNK_ELEMENTS values at a time."""
    num_rows = max(1, CHUNK_ELEMENTS // tensors[0].shape[1])
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)
