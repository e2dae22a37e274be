"""A linear that measures in its backward pass how other formats of its weight would change a loss.

Let g be the gradient of a loss with respect to the output of a linear, and e the change of this
output if the weight was stored in another format. The sum of g . e over all positions is the score
of that format: the change of the loss to first order. One backward pass yields the scores of all
linears and formats.

Shapes: x (tokens, in), y (tokens, out), weight (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear


@dataclass
class Scores:
    """Collects the scores of all linears.

    segments: number of tokens of each row of the batch that runs. found: path -> bits -> scores,
    one per row. on_added: is called after each linear.
    """

    segments: Sequence[int] = ()
    found: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    on_added: Callable[[], None] = lambda: None

    def add(self, path: str, bits: int, per_token: Tensor) -> None:
        """Add the scores of one call of a linear, given at each token.

        A model that computes one row at a time calls with the tokens of one row.
        """
        is_batch = len(per_token) == sum(self.segments)
        rows = per_token.split(list(self.segments)) if is_batch else (per_token,)
        scores = self.found.setdefault(path, {}).setdefault(bits, [])
        scores += torch.stack([row.sum() for row in rows]).tolist()


class MeasuredLinear(QuantLinear):
    """A frozen linear that scores other formats of its weight.

    A weight in 16 bit is in memory only while it computes, a quantized one always.

    base: the linear that this one replaces, without a weight. others: the formats to score. path:
    of the module. read_weight: returns the original weight (out, in) on the device in 16 bit; it
    is set after the model is placed.
    """

    read_weight: Callable[[], Tensor]

    def __init__(
        self, base: QuantLinear, path: str, others: Iterable[WeightFormat], scores: Scores
    ) -> None:
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, has_bias, base.weight_format)
        self.path = path
        self.others = tuple(others)
        self.scores = scores

    def pack(self, weight: Tensor) -> None:
        """Quantize a weight. One in 16 bit is not kept: it is read when it is needed."""
        if self.weight_format.bits < 16:
            super().pack(weight)

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in the compute dtype."""
        if self.weight_format.bits < 16:
            return super().dequantize()
        return self.read_weight().to(self.weight_format.compute)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        y: Tensor = _MeasuredProduct.apply(x.reshape(-1, self.in_features), self)
        return y.view(*x.shape[:-1], self.out_features)

    def add_scores(self, x: Tensor, grad: Tensor) -> None:
        """Score the other formats. grad: of the output (tokens, out)."""
        own, weight = self.product(x), self.read_weight()
        for weight_format in self.others:
            other = QuantLinear(self.in_features, self.out_features, False, weight_format)
            other.bias = self.bias
            other.pack(weight)
            change = other.product(x).sub_(own)
            self.scores.add(self.path, weight_format.bits, change.mul_(grad).sum(dim=1))
        self.scores.on_added()


class _MeasuredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MeasuredLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.layer.add_scores(x, grad)
        return ctx.layer.grad_input(grad), None
