"""The matrix product of a linear with a LoRA adapter: y = x W^T + b + s dropout(x) A^T B^T.

These functions run inside autograd functions and record no graph. Two autograd functions use them
and differ in what they save of x: `adapters/lora.py` saves x itself, `nn/mlp.py` saves the tensors
from which it recomputes x.

Dropout saves no mask. A seed from the CPU generator recreates the mask in the backward pass. Saved
masks and dropped inputs would cost up to 4 bytes per value for each adapted linear, although the
linears share their inputs otherwise.

Shapes: x (tokens, in), y (tokens, out), A (rank, in), B (rows, rank), x A^T (tokens, rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_cli.nn.quant import QuantLinear


@dataclass(frozen=True)
class LoraMatmul:
    """One call of an adapted linear: everything except its tensors.

    A linear has one adapter, or one for each adapted role of a fused projection. lora_slices: the
    rows of W that each adapter changes. scaling: the factor s. dropout: probability. seed: seed of
    the dropout mask, None for no dropout. `factors` of all methods: A and B of the first adapter, A
    and B of the second one, and so on.
    """

    base: QuantLinear
    lora_slices: Sequence[slice] = ()
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int | None = None

    def forward(self, x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return (y, x A^T of each adapter). The backward pass needs the latter."""
        y = self.base.product(x)
        dropped = self.dropped(x)
        lora_activations = []
        for rows, a, b in self._adapters(factors):
            xa = dropped @ a.to(x.dtype).t()
            y[:, rows].addmm_(xa, b.to(x.dtype).t(), alpha=self.scaling)
            lora_activations.append(xa)
        return y, lora_activations

    def grad_activations(self, grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of each adapter's x A^T. grad: gradient of y."""
        return [
            (grad[:, rows] @ b.to(grad.dtype)).mul_(self.scaling)
            for rows, _, b in self._adapters(factors)
        ]

    def grad_factors(
        self,
        x: Tensor,
        grad: Tensor,
        lora_activations: Sequence[Tensor],
        grad_activations: Sequence[Tensor],
        factors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the gradients of `factors`, in the same order. grad: gradient of y."""
        grads = []
        dropped = self.dropped(x)
        for (rows, a, b), xa, grad_xa in zip(
            self._adapters(factors), lora_activations, grad_activations, strict=True
        ):
            grad_b = (grad[:, rows].t() @ xa).mul_(self.scaling)
            grads += [(grad_xa.t() @ dropped).to(a.dtype), grad_b.to(b.dtype)]
        return grads

    def grad_input(
        self, grad: Tensor, grad_activations: Sequence[Tensor], factors: Sequence[Tensor]
    ) -> Tensor:
        """Return the gradient of x. grad: gradient of y."""
        grad_x = self.base.grad_input(grad)
        if not self.lora_slices:
            return grad_x
        # Without dropout the adapters add to grad_x directly and need no buffer of their own.
        total = grad_x if self.seed is None else torch.zeros_like(grad_x)
        for (_, a, _), grad_xa in zip(self._adapters(factors), grad_activations, strict=True):
            total.addmm_(grad_xa, a.to(grad.dtype))
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

    def _adapters(self, factors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, A, B) of each adapter."""
        pairs = factors[: 2 * len(self.lora_slices)]
        yield from zip(self.lora_slices, pairs[0::2], pairs[1::2], strict=True)


class AdaptedLinear(nn.Module):
    """Base class of a frozen linear with trained parameters: what an adapter method puts in place.

    base: the packed linear. Other layers (`nn/mlp.py`), merging and switching rely on this class
    only.
    """

    base: QuantLinear

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
