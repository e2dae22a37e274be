"""The experts of a mixture-of-experts layer with packed, frozen weights, computed one at a time.

transformers stacks the weights of all experts in one parameter (E, out, in), which bitsandbytes'
loader leaves in 16 bit. Here each expert has packed linears of its own, and one expert's weight is
dequantized at a time. The tokens are sorted by expert first, so that the memory of a step does not
depend on how many tokens each expert gets: a dry run, which has no values, can plan it.

Letters: T tokens, k experts per token, n = T k rows, E experts, d hidden size, f inner size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.nn.quant import QuantLinear, WeightFormat

UP_NAMES = ("gate_up_proj", "up_proj")
DOWN_NAME = "down_proj"


@dataclass(frozen=True)
class StackPart:
    """A tensor of a checkpoint that is a part of a stacked parameter.

    name: of the tensor. expert: its number. start, stop: rows of the expert's matrix, in halves.
    """

    name: str
    expert: int
    start: int
    stop: int


class Experts(nn.Module):
    """Replaces a module with transformers' interface for experts, with the same names of weights.

    old: that module, on meta. parts: number of packed linears of each expert, by parameter: a
    checkpoint may store gate and up on their own.
    """

    def __init__(self, old: Any, weight_format: WeightFormat, parts: Callable[[str], int]) -> None:
        super().__init__()
        self.num_experts: int = old.num_experts
        self.is_transposed: bool = old.is_transposed
        self.stacks = {name: tuple(p.shape) for name, p in old._parameters.items() if p.dim() == 3}
        self.up_name = next(name for name in UP_NAMES if name in self.stacks)
        for name, shape in self.stacks.items():
            rows, columns = shape[1:] if not self.is_transposed else reversed(shape[1:])
            number = parts(name)
            linears = [
                QuantLinear(columns, rows // number, False, weight_format)
                for _ in range(self.num_experts * number)
            ]
            self.add_module(name, nn.ModuleList(linears))
        for name, parameter in old._parameters.items():
            if name not in self.stacks:
                self.register_parameter(name, nn.Parameter(parameter, requires_grad=False))
        # The activation is the class's own. It is not a part of this module: it has no weights.
        old._parameters = {}
        self.__dict__["_activation"] = old._apply_gate if old.has_gate else old.act_fn

    def linears(self, name: str, expert: int) -> Sequence[QuantLinear]:
        """Return the packed linears of one expert, whose rows form its matrix (out, in)."""
        modules: Any = self.get_submodule(name)
        number = len(modules) // self.num_experts
        return modules[expert * number : (expert + 1) * number]  # type: ignore[no-any-return]

    def pack_stack(self, name: str, stack: Tensor) -> None:
        """Quantize the matrices of all experts. stack: in the shape of transformers' parameter."""
        for expert, matrix in enumerate(stack):
            weight = matrix.t() if self.is_transposed else matrix
            (linear,) = self.linears(name, expert)
            linear.pack(weight.contiguous())

    def dequantized_stack(self, name: str) -> Tensor:
        """Return the weights that the experts compute with, as transformers' parameter has them."""
        weights = [self._weight(name, expert) for expert in range(self.num_experts)]
        return torch.stack([w.t() if self.is_transposed else w for w in weights])

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """Map hidden states (T, d), expert numbers (T, k) and their weights (T, k) to (T, d)."""
        index = top_k_index if top_k_index is not None else router_indices
        weights = top_k_weights if top_k_weights is not None else routing_weights
        out: Tensor = _ExpertsProduct.apply(hidden_states, weights, index, self)
        return out

    def activation(self, inner: Tensor) -> Tensor:
        """Map the output of the first projection (n, 2 f or f) to the input of the second."""
        out: Tensor = self.__dict__["_activation"](inner)
        return out

    def bias(self, name: str) -> Tensor | None:
        """Return the biases (E, out) of a projection; None if it has none."""
        return self._parameters.get(f"{name}_bias")

    def product(self, name: str, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return x W^T + b of rows (n, in) that are sorted by expert."""
        out, bias, start = None, self.bias(name), 0
        for expert, count in enumerate(counts):
            if count:
                rows, weight = slice(start, start + count), self._weight(name, expert)
                out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
                torch.mm(x[rows], weight.t(), out=out[rows])
                if bias is not None:
                    out[rows] += bias[expert].to(x.dtype)
                del weight
            start += count
        assert out is not None
        return out

    def grad_input(self, name: str, grad: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the gradient (n, in) of the input of `product`. grad: (n, out)."""
        out, start = None, 0
        for expert, count in enumerate(counts):
            if count:
                rows, weight = slice(start, start + count), self._weight(name, expert)
                out = grad.new_empty(grad.shape[0], weight.shape[1]) if out is None else out
                torch.mm(grad[rows], weight, out=out[rows])
                del weight
            start += count
        assert out is not None
        return out

    def _weight(self, name: str, expert: int) -> Tensor:
        """Return one expert's matrix (out, in) in the compute dtype."""
        parts = [linear.dequantize() for linear in self.linears(name, expert)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _ExpertsProduct(torch.autograd.Function):
    """Gradients of hidden states and routing weights. The backward pass dequantizes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, index: Tensor, experts: Experts) -> Tensor:
        num_active = index.shape[-1]
        order = index.flatten().argsort(stable=True)
        counts = rows_per_expert(index, experts.num_experts)
        rows = x[order // num_active]
        inner = experts.product(experts.up_name, rows, counts)
        del rows
        y = experts.product(DOWN_NAME, experts.activation(inner), counts)
        y.mul_(weights.flatten()[order].to(y.dtype)[:, None])
        ctx.save_for_backward(weights, order, inner)
        ctx.experts, ctx.counts = experts, counts
        return sum_over_experts(y, order, num_active)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, order, inner = ctx.saved_tensors
        experts: Experts = ctx.experts
        num_active = weights.shape[-1]
        grad_rows = grad[order // num_active]
        grad_act = experts.grad_input(DOWN_NAME, grad_rows, ctx.counts)
        with torch.enable_grad():
            inner = inner.detach().requires_grad_()
            activated = experts.activation(inner)
        grad_weights = (grad_act * activated.detach()).sum(dim=-1)
        if (bias := experts.bias(DOWN_NAME)) is not None:
            numbers = torch.repeat_interleave(
                torch.arange(experts.num_experts, device=grad.device),
                torch.tensor(ctx.counts, device=grad.device),
                output_size=order.shape[0],
            )
            grad_weights += (grad_rows * bias[numbers].to(grad.dtype)).sum(dim=-1)
        del grad_rows
        grad_act.mul_(weights.flatten()[order].to(grad_act.dtype)[:, None])
        (grad_inner,) = torch.autograd.grad(activated, inner, grad_act)
        del activated, grad_act
        grad_x = experts.grad_input(experts.up_name, grad_inner, ctx.counts)
        in_order = torch.empty_like(grad_weights).index_copy_(0, order, grad_weights)
        grad_weights = in_order.view(weights.shape).to(weights.dtype)
        return sum_over_experts(grad_x, order, num_active), grad_weights, None, None


def rows_per_expert(index: Tensor, num_experts: int) -> list[int]:
    """Return the number of rows of each expert; any numbers with the right sum on meta."""
    if index.is_meta:
        number, rest = divmod(index.numel(), num_experts)
        return [number + (expert < rest) for expert in range(num_experts)]
    found: list[int] = torch.bincount(index.flatten(), minlength=num_experts).tolist()
    return found


def sum_over_experts(y: Tensor, order: Tensor, num_active: int) -> Tensor:
    """Return the sums (T, d) over the experts of each token of rows (n, d), sorted by expert."""
    in_order = torch.empty_like(y).index_copy(0, order, y)
    return in_order.view(-1, num_active, y.shape[-1]).sum(dim=1)
