"""The matrix product of a linear with a DoRA adapter: y = g (x W^T + s dropout(x) A^T B^T) + b.

The gain g = m / ||W + s B A|| of each output row makes the length of its weight the trained
magnitude m (Liu et al. 2024). As in PEFT, the length is a constant in the backward pass (section
4.3 of the paper). The output before the gain, which the gradient of m needs, is computed again and
not saved.

Shapes: as in `lora_matmul.py`; m, ||W + s B A|| and g (rows,) in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.nn.lora_matmul import LoraMatmul


@dataclass(frozen=True)
class DoraMatmul(LoraMatmul):
    """One call of a linear with a DoRA adapter.

    lengths: ||W + s B A|| of each adapter's rows. `factors` of all methods: A and B of the first
    adapter, A and B of the second one, and so on, then m of each adapter.
    """

    lengths: Sequence[Tensor] = ()

    def forward(self, x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return (y, x A^T of each adapter)."""
        y, lora_activations = super().forward(x, factors)
        bias = self.base.bias
        for rows, gain in self._gains(factors):
            part = y[:, rows]
            if bias is not None:
                part.sub_(bias[rows])
            _multiply(part, gain)
            if bias is not None:
                part.add_(bias[rows])
        return y, lora_activations

    def grad_activations(self, grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of each adapter's x A^T. grad: gradient of y."""
        gains = self._gains(factors)
        return [
            (grad[:, rows] @ (b * gain[:, None]).to(grad.dtype)).mul_(self.scaling)
            for (rows, _, b), (_, gain) in zip(self._adapters(factors), gains, strict=True)
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
        grads = super().grad_factors(x, grad, lora_activations, grad_activations, factors)
        for index, (_, gain) in enumerate(self._gains(factors)):
            grads[2 * index + 1].mul_(gain[:, None])
        # The output before the gain and without the bias: the product that LoRA computes.
        before, _ = super().forward(x, factors)
        for rows, length in zip(self.lora_slices, self.lengths, strict=True):
            part = before[:, rows]
            if self.base.bias is not None:
                part.sub_(self.base.bias[rows])
            part.mul_(grad[:, rows])
            grads.append(part.sum(dim=0, dtype=torch.float32).div_(length))
        return grads

    def grad_input(
        self, grad: Tensor, grad_activations: Sequence[Tensor], factors: Sequence[Tensor]
    ) -> Tensor:
        """Return the gradient of x. grad: gradient of y."""
        scaled = grad.clone()
        for rows, gain in self._gains(factors):
            _multiply(scaled[:, rows], gain)
        return super().grad_input(scaled, grad_activations, factors)

    def _gains(self, factors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, g) of each adapter."""
        magnitudes = factors[2 * len(self.lora_slices) :]
        for rows, m, length in zip(self.lora_slices, magnitudes, self.lengths, strict=True):
            yield rows, m / length


def _multiply(part: Tensor, gain: Tensor) -> None:
    """Multiply `part` (tokens, rows) by `gain` (rows,) in place.

    A gain is close to 1, where 16 bit are too coarse. Its difference from 1 is not.
    """
    part.addcmul_(part, (gain - 1).to(part.dtype))
