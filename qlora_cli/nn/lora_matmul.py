"""The matrix product of linears with LoRA adapters: y = x W^T + b + s dropout(x) A^T B^T.

Linears that have the same input, such as q, k and v, are one product: then x is multiplied by all A
at once, and their gradients of x are added in the matrix products.

These functions run inside autograd functions and record no graph. Two autograd functions use them
and differ in what they save of x: `nn/lora_product.py` saves x itself, `nn/mlp.py` saves the
tensors from which it recomputes x.

Dropout saves no mask. A seed from the CPU generator recreates the mask in the backward pass. Saved
masks and dropped inputs would cost up to 4 bytes per value for each adapted linear, although the
linears share their inputs otherwise.

Shapes: x (tokens, in), y (tokens, out), A (rank, in), B (rows, rank), x A^T (tokens, ranks) with
the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import scope
from qlora_cli.nn.quant import QuantLinear


class LoraSlice(NamedTuple):
    """What one adapter changes: the rows of the weight of the linear with this index."""

    linear: int
    rows: slice


class CastFactors(NamedTuple):
    """The factors in the compute dtype: every A (ranks, in), None without adapters, and each B."""

    a: Tensor | None
    b: Sequence[Tensor]


@dataclass(frozen=True)
class LoraMatmul:
    """One call of one or several linears with one input: everything except its tensors.

    A linear has one adapter, or one for each adapted role of a fused projection. lora_slices: one
    for each adapter. scaling: the factor s. dropout: probability. seed: seed of the dropout mask,
    None for no dropout. `factors` of all methods: A and B of the first adapter, A and B of the
    second one, and so on, of one dtype.
    """

    bases: Sequence[QuantLinear]
    lora_slices: Sequence[LoraSlice] = ()
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int | None = None

    def cast(self, factors: Sequence[Tensor], dtype: torch.dtype) -> CastFactors:
        """Return the factors in `dtype`, every A in one tensor."""
        a, b = self._a(factors), self._b(factors)
        if not a:
            return CastFactors(None, ())
        with scope("temporary"):
            if a[0].dtype == dtype:
                return CastFactors(a[0] if len(a) == 1 else torch.cat(list(a)), b)
            # One kernel casts all of them.
            copy = a[0].new_empty(sum(map(Tensor.numel, (*a, *b))), dtype=dtype)
            copies = _views(copy, [*a, *b])
            torch._foreach_copy_(copies, [*a, *b])
        ranks = sum(part.shape[0] for part in a)
        return CastFactors(copy[: ranks * a[0].shape[1]].view(ranks, -1), copies[len(a) :])

    def lora_activations(self, x: Tensor, cast: CastFactors) -> Tensor | None:
        """Return x A^T of all adapters (tokens, ranks), which the backward pass needs."""
        return None if cast.a is None else self.dropped(x) @ cast.a.t()

    def outputs(
        self,
        x: Tensor,
        lora_activations: Tensor | None,
        cast: CastFactors,
        factors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return y of each linear."""
        outputs = [base.product(x) for base in self.bases]
        if lora_activations is not None:
            for at, part, b in self._adapters(factors, lora_activations, cast.b):
                outputs[at.linear][:, at.rows].addmm_(part, b.t(), alpha=self.scaling)
        return outputs

    def grad_activations(
        self, grads: Sequence[Tensor], cast: CastFactors, factors: Sequence[Tensor]
    ) -> Tensor | None:
        """Return the gradient of x A^T divided by s (tokens, ranks). grads: gradient of each y."""
        if cast.a is None:
            return None
        if len(self.lora_slices) == 1:
            at = self.lora_slices[0]
            return grads[at.linear][:, at.rows] @ cast.b[0]
        grad_xa = grads[0].new_empty(grads[0].shape[0], cast.a.shape[0])
        for at, part, b in self._adapters(factors, grad_xa, cast.b):
            torch.mm(grads[at.linear][:, at.rows], b, out=part)
        return grad_xa

    def grad_factors(
        self,
        x: Tensor,
        grads: Sequence[Tensor],
        lora_activations: Tensor | None,
        grad_activations: Tensor | None,
        factors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the gradients of `factors`, in the same order: views of one tensor.

        grads: gradient of each y.
        """
        if lora_activations is None or grad_activations is None:
            return []
        a, b = self._a(factors), self._b(factors)
        flat = x.new_empty(sum(map(Tensor.numel, (*a, *b))))
        num_a = sum(map(Tensor.numel, a))
        torch.mm(grad_activations.t(), self.dropped(x), out=flat[:num_a].view(-1, x.shape[1]))
        grads_b = _views(flat[num_a:], b)
        for at, part, grad_b in self._adapters(factors, lora_activations, grads_b):
            torch.mm(grads[at.linear][:, at.rows].t(), part, out=grad_b)
        if flat.dtype == a[0].dtype:
            flat.mul_(self.scaling)
        else:
            flat = torch.mul(flat, self.scaling, out=flat.new_empty(flat.shape, dtype=a[0].dtype))
        found = _views(flat, [*a, *b])
        return [
            grad for pair in zip(found[: len(a)], found[len(a) :], strict=True) for grad in pair
        ]

    def grad_input(
        self,
        grads: Sequence[Tensor],
        grad_activations: Tensor | None,
        cast: CastFactors,
        factors: Sequence[Tensor],
    ) -> Tensor:
        """Return the gradient of x. grads: gradient of each y."""
        grad_x = self.bases[0].grad_input(grads[0])
        for base, grad in zip(self.bases[1:], grads[1:], strict=True):
            base.grad_input(grad, grad_x)
        if cast.a is None or grad_activations is None:
            return grad_x
        # Without dropout the adapters add to grad_x directly and need no buffer of their own.
        total = grad_x if self.seed is None else torch.zeros_like(grad_x)
        total.addmm_(grad_activations, cast.a, alpha=self.scaling)
        return grad_x if self.seed is None else grad_x.add_(self._drop_inplace(total))

    def dropped(self, x: Tensor) -> Tensor:
        """Return dropout(x), with the same mask in each call.

        Dropout with a fixed mask is linear and symmetric, so it is its own backward function.
        """
        return x if self.seed is None else self._drop_inplace(x.clone())

    def _drop_inplace(self, x: Tensor) -> Tensor:
        assert self.seed is not None
        generator_device = torch.device("cpu") if x.is_meta else x.device
        generator = torch.Generator(generator_device).manual_seed(self.seed)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        mask.bernoulli_(self.dropout, generator=generator)
        return x.masked_fill_(mask, 0.0).div_(1 - self.dropout)

    def _a(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        return factors[: 2 * len(self.lora_slices) : 2]

    def _b(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        return factors[1 : 2 * len(self.lora_slices) : 2]

    def _adapters(
        self, factors: Sequence[Tensor], activations: Tensor, others: Sequence[Tensor]
    ) -> Iterator[tuple[LoraSlice, Tensor, Tensor]]:
        """Yield (slice, columns of `activations` (tokens, ranks), item of `others`) per adapter."""
        parts = activations.split([a.shape[0] for a in self._a(factors)], dim=1)
        yield from zip(self.lora_slices, parts, others, strict=True)


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive parts of a tensor with the shapes of other tensors."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class AdaptedLinear(nn.Module):
    """Base class of a frozen linear with trained parameters: what an adapter method puts in place.

    base: the packed linear. Other layers (`nn/mlp.py`), merging and switching rely on this class
    only.
    """

    base: QuantLinear

    @property
    def joins(self) -> bool:
        """Return whether it may be computed together with others that have the same input."""
        return False

    def initialize(self, device: torch.device, generator: torch.Generator) -> None:
        """Create the trained parameters on `device`. generator: on the CPU."""
        raise NotImplementedError

    def start_matmul(self) -> tuple[LoraMatmul, list[Tensor]]:
        """Return (one call with its dropout seed drawn, the factors A and B of each adapter)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return what merging adds to the weight: (out, in), float32."""
        raise NotImplementedError


def draw_seed() -> int:
    """Draw a seed from torch's CPU generator.

    Training checkpoints store the state of that generator, and activation checkpointing restores it
    before it recomputes a block.
    """
    return int(torch.randint(2**62, ()).item())
