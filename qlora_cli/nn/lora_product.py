"""The product of adapted linears as one autograd function: it saves x and x A^T and nothing else.

A composition of modules would save two more copies of x. Linears with the same input are computed
together if nothing prevents it (`joined`): x is read and saved once, and its gradient is one sum.

Shapes: as in `lora_matmul.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.nn.lora_matmul import AdaptedLinear, LoraMatmul, LoraSlice
from qlora_cli.nn.quant import QuantLinear

Started = tuple[LoraMatmul, list[Tensor]]
"""One call, with its dropout seed drawn, and its factors."""


def outputs_of(linears: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the output (..., out) of each linear for one input (..., in).

    linears: QuantLinear or AdaptedLinear. Differentiable in x and in the adapters. They are
    computed together if they can be.
    """
    joined_call = joined(linears) if torch.is_grad_enabled() else None
    if joined_call is None:
        return [linear(x) for linear in linears]
    matmul, factors = joined_call
    return [y.view(*x.shape[:-1], -1) for y in lora_product(x, matmul, factors)]


def lora_product(x: Tensor, matmul: LoraMatmul, factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return y (tokens, out) of each linear. x: (..., in). With gradients enabled."""
    flat = x.reshape(-1, x.shape[-1])
    outputs: Sequence[Tensor] = _LoraProduct.apply(flat, matmul, *factors)
    return outputs


def joined(linears: Sequence[nn.Module]) -> Started | None:
    """Return one call of several linears with the same input, or None if each needs its own.

    Each needs its own if only one is given or none is adapted, if one has hooks, dropout or another
    method than LoRA, or if their scalings or dtypes differ.
    """
    if len(linears) < 2 or not all(map(_may_join, linears)):
        return None
    calls = [started(linear) for linear in linears]
    adapted = [matmul for matmul, _ in calls if matmul.lora_slices]
    factors = [factor for _, own in calls for factor in own]
    kinds = {(matmul.scaling, matmul.seed) for matmul in adapted}
    if len(kinds) != 1 or len({factor.dtype for factor in factors}) != 1:
        return None
    slices = tuple(
        LoraSlice(index, at.rows)
        for index, (matmul, _) in enumerate(calls)
        for at in matmul.lora_slices
    )
    bases = tuple(matmul.bases[0] for matmul, _ in calls)
    return LoraMatmul(bases, slices, adapted[0].scaling), factors


def _may_join(linear: nn.Module) -> bool:
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    if isinstance(linear, AdaptedLinear):
        return linear.joins
    return isinstance(linear, QuantLinear)


def started(linear: nn.Module) -> Started:
    """Return (one call of a linear with its dropout seed drawn, its factors)."""
    if isinstance(linear, AdaptedLinear):
        return linear.start_matmul()
    assert isinstance(linear, QuantLinear), type(linear)
    return LoraMatmul((linear,)), []


class _LoraProduct(torch.autograd.Function):
    """The packed products plus the low-rank products; saves x and x A^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matmul: LoraMatmul, *factors: Tensor) -> tuple[Tensor, ...]:
        cast = matmul.cast(factors, x.dtype)
        lora_activations = matmul.lora_activations(x, cast)
        outputs = matmul.outputs(x, lora_activations, cast, factors)
        ctx.save_for_backward(x, lora_activations, *factors)
        ctx.matmul = matmul
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        matmul: LoraMatmul = ctx.matmul
        x, lora_activations, *factors = ctx.saved_tensors
        cast = matmul.cast(factors, x.dtype)
        grad_xa = matmul.grad_activations(grads, cast, factors)
        grad_factors = matmul.grad_factors(x, grads, lora_activations, grad_xa, factors)
        if not ctx.needs_input_grad[0]:
            return (None, None, *grad_factors)
        return (matmul.grad_input(grads, grad_xa, cast, factors), None, *grad_factors)
