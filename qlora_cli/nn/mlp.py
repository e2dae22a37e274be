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

from qlora_cli.nn.lora_matmul import CastFactors, LoraMatmul
from qlora_cli.nn.lora_product import outputs_of, started

CHUNK_ELEMENTS = 2**22
"""Values whose gradients are computed at once: two temporaries of 8 MiB each in 16 bit. More if the
dequantized part of down's weight, which is freed before, is larger than two temporaries."""

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
        names = self.projections
        inputs = [self.get_submodule(name) for name in (names.gate, names.up) if name is not None]
        *gates, up = (y.reshape(-1, y.shape[-1]) for y in outputs_of(inputs, x))
        gate = gates[0] if gates else None
        matmul, factors = started(self.get_submodule(names.down))
        kept = _KeptForDown()
        token = _KeepForDown.apply(kept, self.activation, matmul, gate, up, *factors)
        y: Tensor = _DownProduct.apply(kept, token, gate, up, *factors)
        return y.view(*x.shape[:-1], matmul.bases[0].out_features)

    def _forward_without_grad(self, x: Tensor) -> Tensor:
        """Free each intermediate tensor before the next one is computed."""
        names = self.projections
        inner = self.activation.forward(self.get_submodule(names.gate or names.up)(x))
        if names.gate is not None:
            inner.mul_(self.get_submodule(names.up)(x))
        y: Tensor = self.get_submodule(names.down)(inner)
        return y


@dataclass
class _KeptForDown:
    """What `_KeepForDown` passes on to `_DownProduct`, which empties it."""

    ctx: Any = None
    x: Tensor | None = None
    lora_activations: Tensor | None = None
    cast: CastFactors | None = None


class _KeepForDown(torch.autograd.Function):
    """Saves what the backward pass of down needs, before the product of down is computed.

    A checkpoint stops to recompute a block as soon as its last tensor is saved. So it does not
    compute the product of down again, which is a quarter of all products of a block. The output is
    an empty tensor that keeps this node alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kept: _KeptForDown,
        activation: Activation,
        matmul: LoraMatmul,
        gate: Tensor | None,
        up: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        x = _down_input(activation, gate, up)
        cast = matmul.cast(factors, x.dtype)
        lora_activations = matmul.lora_activations(x, cast)
        ctx.save_for_backward(gate, up, lora_activations, *factors)
        ctx.activation, ctx.matmul = activation, matmul
        ctx.set_materialize_grads(False)
        kept.ctx, kept.x, kept.lora_activations, kept.cast = ctx, x, lora_activations, cast
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        """Return no gradient: `_DownProduct` computes all of them."""
        return (None,) * len(ctx.needs_input_grad)


class _DownProduct(torch.autograd.Function):
    """The product of down. The backward pass recomputes its input."""

    @staticmethod
    def forward(
        ctx: Any,
        kept: _KeptForDown,
        token: Tensor,
        gate: Tensor | None,
        up: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        assert kept.x is not None
        assert kept.cast is not None
        ctx.kept = kept.ctx
        x, lora_activations, cast = kept.x, kept.lora_activations, kept.cast
        kept.x = kept.lora_activations = kept.cast = kept.ctx = None
        outputs: list[Tensor] = ctx.kept.matmul.outputs(x, lora_activations, cast, factors)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matmul: LoraMatmul = ctx.kept.matmul
        activation: Activation = ctx.kept.activation
        gate, up, lora_activations, *factors = ctx.kept.saved_tensors
        cast = matmul.cast(factors, up.dtype)
        grad_xa = matmul.grad_activations([grad], cast, factors)
        grads: list[Tensor] = []
        if factors:
            # Freed before the gradient of the same size is allocated.
            x = _down_input(activation, gate, up)
            grads = matmul.grad_factors(x, [grad], lora_activations, grad_xa, factors)
            del x
        if not any(ctx.needs_input_grad[2:4]):
            return (None, None, None, None, *grads)
        grad_x = matmul.grad_input([grad], grad_xa, cast, factors)
        largest = max(CHUNK_ELEMENTS, matmul.bases[0].piece_bytes // (2 * up.itemsize))
        return (None, None, *_grad_gate_and_up(activation, grad_x, gate, up, largest), *grads)


def _down_input(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return the input of down (tokens, f)."""
    return activation.forward(up) if gate is None else activation.forward(gate).mul_(up)


def _grad_gate_and_up(
    activation: Activation, grad: Tensor, gate: Tensor | None, up: Tensor, largest: int
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of gate and up. They overwrite `grad` and `up`.

    grad: gradient of the input of down. largest: number of values that are computed at once.
    Overwriting is safe: nothing else uses these tensors, because a projection saves its input and
    not its output. A second backward pass through the same graph raises an error of torch and gives
    no wrong gradient.
    """
    if gate is None:
        activation.gradient(grad, up, grad_input=grad)
        return None, grad
    up = up.detach()
    for grad_chunk, gate_chunk, up_chunk in _chunks(largest, grad, gate.detach(), up):
        grad_act = grad_chunk * up_chunk
        torch.mul(grad_chunk, activation.forward(gate_chunk), out=up_chunk)
        activation.gradient(grad_act, gate_chunk, grad_input=grad_chunk)
    return grad, up


def _chunks(largest: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of each tensor, at most `largest` values at a time."""
    num_rows = max(1, largest // tensors[0].shape[1])
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)
