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

from qlora_cli.nn.lora_matmul import CastFactors, LoraMatmul


@dataclass(frozen=True)
class DoraMatmul(LoraMatmul):
    """One call of one linear with DoRA adapters.

    lengths: ||W + s B A|| of each adapter's rows. `factors` of all methods: A and B of the first
    adapter, A and B of the second one, and so on, then m of each adapter.
    """

    lengths: Sequence[Tensor] = ()

    def outputs(
        self,
        x: Tensor,
        lora_activations: Tensor | None,
        cast: CastFactors,
        factors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return y of the linear, in a list."""
        outputs = super().outputs(x, lora_activations, cast, factors)
        bias = self.bases[0].bias
        for rows, gain in self._gains(factors):
            part = outputs[0][:, rows]
            if bias is not None:
                part.sub_(bias[rows])
            _multiply(part, gain)
            if bias is not None:
                part.add_(bias[rows])
        return outputs

    def grad_activations(
        self, grads: Sequence[Tensor], cast: CastFactors, factors: Sequence[Tensor]
    ) -> Tensor | None:
        """Return the gradient of x A^T divided by s (tokens, ranks). grads: gradient of y."""
        scaled = [
            (b * gain[:, None]).to(grads[0].dtype)
            for b, (_, gain) in zip(self._b(factors), self._gains(factors), strict=True)
        ]
        return super().grad_activations(grads, CastFactors(cast.a, scaled), factors)

    def grad_factors(
        self,
        x: Tensor,
        grads: Sequence[Tensor],
        lora_activations: Tensor | None,
        grad_activations: Tensor | None,
        factors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the gradients of `factors`, in the same order. grads: gradient of y."""
        found = super().grad_factors(x, grads, lora_activations, grad_activations, factors)
        for index, (_, gain) in enumerate(self._gains(factors)):
            found[2 * index + 1].mul_(gain[:, None])
        # The output before the gain and without the bias: the product that LoRA computes.
        cast, bias = self.cast(factors, x.dtype), self.bases[0].bias
        (before,) = super().outputs(x, lora_activations, cast, factors)
        for (_, rows), length in zip(self.lora_slices, self.lengths, strict=True):
            part = before[:, rows]
            if bias is not None:
                part.sub_(bias[rows])
            part.mul_(grads[0][:, rows])
            found.append(part.sum(dim=0, dtype=torch.float32).div_(length))
        return found

    def grad_input(
        self,
        grads: Sequence[Tensor],
        grad_activations: Tensor | None,
        cast: CastFactors,
        factors: Sequence[Tensor],
    ) -> Tensor:
        """Return the gradient of x. grads: gradient of y."""
        scaled = grads[0].clone()
        for rows, gain in self._gains(factors):
            _multiply(scaled[:, rows], gain)
        return super().grad_input([scaled], grad_activations, cast, factors)

    def _gains(self, factors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, g) of each adapter."""
        magnitudes = factors[2 * len(self.lora_slices) :]
        for (_, rows), m, length in zip(self.lora_slices, magnitudes, self.lengths, strict=True):
            yield rows, m / length


def _multiply(part: Tensor, gain: Tensor) -> None:
    """Multiply `part` (tokens, rows) by `gain` (rows,) in place.

    A gain is close to 1, where 16 bit are too coarse. Its difference from 1 is not.
    """
    part.addcmul_(part, (gain - 1).to(part.dtype))
