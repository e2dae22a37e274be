"""One stacked parameter (E, out, in) of a mixture of experts, with packed weights, and its product.

Each expert has packed linears of its own, and one expert's weight is dequantized at a time. LoRA on
experts adds s B_e A_e to the matrix of each expert e. The functions run inside an autograd function
(`experts.py`) and record no graph. The rows of their tensors are sorted by expert.

Shapes: x (n, in), y (n, out), A (E, rank, in), B (E, out, rank), x A^T (n, rank).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import represents
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear

_EXPERTS_ON_META = 2


@dataclass(frozen=True)
class StackLora:
    """The LoRA adapter of one call: A and B of all experts, and the factor of their product."""

    a: Tensor
    b: Tensor
    scaling: float

    def gradients(
        self, x: Tensor, grad: Tensor, xa: Tensor, grad_xa: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of A and B. grad, grad_xa: gradients of y and of x A^T.

        counts: number of rows of each expert; an expert without rows gets zeros.
        """
        grad_a, grad_b = torch.zeros_like(self.a), torch.zeros_like(self.b)
        for expert, rows in _rows(counts, x.is_meta):
            grad_a[expert] = grad_xa[rows].t() @ x[rows]
            grad_b[expert] = (grad[rows].t() @ xa[rows]).mul_(self.scaling)
        return grad_a, grad_b


class ExpertStack(nn.ModuleList):
    """The packed linears of all experts, in the order of the experts.

    num_parts: packed linears of each expert; a checkpoint may store gate and up on their own.
    """

    def __init__(
        self,
        num_experts: int,
        num_parts: int,
        in_features: int,
        out_features: int,
        weight_format: WeightFormat,
    ) -> None:
        linears = (
            QuantLinear(in_features, out_features // num_parts, False, weight_format)
            for _ in range(num_experts * num_parts)
        )
        super().__init__(linears)
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format

    def linears(self, expert: int) -> Sequence[QuantLinear]:
        """Return the packed linears of one expert, whose rows form its matrix (out, in)."""
        number = len(self) // self.num_experts
        numbers = range(expert * number, (expert + 1) * number)
        return [cast(QuantLinear, self[index]) for index in numbers]

    def weight(self, expert: int) -> Tensor:
        """Return one expert's matrix (out, in) in the compute dtype."""
        parts = [linear.dequantize() for linear in self.linears(expert)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def device(self) -> torch.device:
        """Return the device of the packed weights."""
        return self.linears(0)[0].weight.device

    def product(
        self, x: Tensor, counts: Sequence[int], bias: Tensor | None, lora: StackLora | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (x W^T + b, x A^T). bias: (E, out). The second is None without an adapter."""
        y = x.new_empty(x.shape[0], self.out_features)
        xa = None if lora is None else x.new_empty(x.shape[0], lora.a.shape[1])
        for expert, rows in _rows(counts, x.is_meta):
            torch.mm(x[rows], self.weight(expert).t(), out=y[rows])
            if bias is not None:
                y[rows] += bias[expert].to(x.dtype)
            if lora is not None and xa is not None:
                torch.mm(x[rows], lora.a[expert].to(x.dtype).t(), out=xa[rows])
                b = lora.b[expert].to(x.dtype)
                y[rows].addmm_(xa[rows], b.t(), alpha=lora.scaling)
        return y, xa

    def grad_input(
        self, grad: Tensor, counts: Sequence[int], lora: StackLora | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of x and of x A^T. grad: gradient of y (n, out)."""
        grad_x = grad.new_empty(grad.shape[0], self.in_features)
        grad_xa = None if lora is None else grad.new_empty(grad.shape[0], lora.a.shape[1])
        for expert, rows in _rows(counts, grad.is_meta):
            torch.mm(grad[rows], self.weight(expert), out=grad_x[rows])
            if lora is not None and grad_xa is not None:
                torch.mm(grad[rows], lora.b[expert].to(grad.dtype), out=grad_xa[rows])
                grad_xa[rows].mul_(lora.scaling)
                grad_x[rows].addmm_(grad_xa[rows], lora.a[expert].to(grad.dtype))
        return grad_x, grad_xa


class AdaptedStack(nn.Module):
    """Base class of a frozen stack with trained parameters: what an adapter method puts in place.

    base: the packed stack. The experts and merging rely on this class only.
    """

    base: ExpertStack

    def lora(self) -> StackLora:
        """Return the adapter of one call."""
        raise NotImplementedError


def _rows(counts: Sequence[int], is_meta: bool) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) of each expert that has rows.

    Experts run one after the other and need the same memory: on meta two represent all.
    """
    ends = itertools.accumulate(counts)
    rows = enumerate(zip(counts, ends, strict=True))
    found = [(expert, slice(end - count, end)) for expert, (count, end) in rows if count]
    run = found[:_EXPERTS_ON_META] if is_meta else found
    with represents(len(found) / len(run) if run else 1.0):
        yield from run
