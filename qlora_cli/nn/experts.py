"""The experts of a mixture-of-experts layer with packed, frozen weights, computed one at a time.

transformers stacks the weights of all experts in one parameter (E, out, in), which bitsandbytes'
loader leaves in 16 bit. Here each expert has packed linears of its own, and one expert's weight is
dequantized at a time. The tokens are sorted by expert first, so that the memory of a step does not
depend on how many tokens each expert gets: a dry run, which has no values, can plan it.

Letters: T tokens, k experts per token, n = T k rows, E experts, d hidden size, f inner size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_cli.nn.expert_stack import AdaptedStack, ExpertStack, StackLora
from qlora_cli.nn.packing import WeightFormat

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

    old: that module, on meta. format_of: format of a stacked parameter, by name. parts: number of
    packed linears of each expert, by parameter: a checkpoint may store gate and up on their own.
    """

    def __init__(
        self, old: Any, format_of: Callable[[str], WeightFormat], parts: Callable[[str], int]
    ) -> None:
        super().__init__()
        self.num_experts: int = old.num_experts
        self.is_transposed: bool = old.is_transposed
        self.stacks = {name: tuple(p.shape) for name, p in old._parameters.items() if p.dim() == 3}
        self.up_name = next(name for name in UP_NAMES if name in self.stacks)
        for name, shape in self.stacks.items():
            rows, columns = shape[1:] if not self.is_transposed else reversed(shape[1:])
            stack = ExpertStack(self.num_experts, parts(name), columns, rows, format_of(name))
            self.add_module(name, stack)
        for name, parameter in old._parameters.items():
            if name not in self.stacks:
                self.register_parameter(name, nn.Parameter(parameter, requires_grad=False))
        # The activation is the class's own. It is not a part of this module: it has no weights.
        old._parameters = {}
        self.__dict__["_activation"] = old._apply_gate if old.has_gate else old.act_fn

    def stack(self, name: str) -> ExpertStack:
        """Return the packed weights of a stacked parameter, without its adapter."""
        module = self.get_submodule(name)
        return module.base if isinstance(module, AdaptedStack) else cast(ExpertStack, module)

    def lora(self, name: str) -> StackLora | None:
        """Return the adapter of a stacked parameter; None if it has none."""
        module = self.get_submodule(name)
        return module.lora() if isinstance(module, AdaptedStack) else None

    def pack_stack(self, name: str, stack: Tensor) -> None:
        """Quantize the matrices of all experts. stack: in the shape of transformers' parameter."""
        for expert, matrix in enumerate(stack):
            weight = matrix.t() if self.is_transposed else matrix
            (linear,) = self.stack(name).linears(expert)
            linear.pack(weight.contiguous())

    def dequantized_stack(self, name: str) -> Tensor:
        """Return the weights that the experts compute with, as transformers' parameter has them."""
        weights = map(self.stack(name).weight, range(self.num_experts))
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
        adapters = (self.lora(self.up_name), self.lora(DOWN_NAME))
        factors = [f for lora in adapters for f in ((lora.a, lora.b) if lora else (None, None))]
        out: Tensor = _ExpertsProduct.apply(hidden_states, weights, index, self, adapters, *factors)
        return out

    def activation(self, inner: Tensor) -> Tensor:
        """Map the output of the first projection (n, 2 f or f) to the input of the second."""
        out: Tensor = self.__dict__["_activation"](inner)
        return out

    def bias(self, name: str) -> Tensor | None:
        """Return the biases (E, out) of a projection; None if it has none."""
        return self._parameters.get(f"{name}_bias")


class _ExpertsProduct(torch.autograd.Function):
    """Gradients of hidden states, routing weights and adapters.

    The backward pass dequantizes again. It saves the hidden states only if the first projection has
    an adapter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        index: Tensor,
        experts: Experts,
        adapters: tuple[StackLora | None, StackLora | None],
        *factors: Tensor | None,
    ) -> Tensor:
        up, down = adapters
        num_active = index.shape[-1]
        order = index.flatten().argsort(stable=True)
        counts = rows_per_expert(index, experts.num_experts)
        rows = x[order // num_active]
        stack, bias = experts.stack(experts.up_name), experts.bias(experts.up_name)
        inner, up_xa = stack.product(rows, counts, bias, up)
        del rows
        y, down_xa = experts.stack(DOWN_NAME).product(
            experts.activation(inner), counts, experts.bias(DOWN_NAME), down
        )
        y.mul_(weights.flatten()[order].to(y.dtype)[:, None])
        saved_x = None if up is None else x
        ctx.save_for_backward(weights, order, inner, saved_x, up_xa, down_xa, *factors)
        ctx.experts, ctx.counts = experts, counts
        ctx.scalings = [None if lora is None else lora.scaling for lora in adapters]
        return sum_over_experts(y, order, num_active)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, order, inner, x, up_xa, down_xa, *factors = ctx.saved_tensors
        experts, counts = ctx.experts, ctx.counts
        up, down = _adapters(factors, ctx.scalings)
        num_active = weights.shape[-1]
        row_weights = weights.flatten()[order].to(grad.dtype)[:, None]
        grad_rows = grad[order // num_active]
        grad_act, grad_xa = experts.stack(DOWN_NAME).grad_input(grad_rows, counts, down)
        with torch.enable_grad():
            inner = inner.detach().requires_grad_()
            activated = experts.activation(inner)
        grad_weights = _grad_weights(experts, counts, grad_rows, grad_act, activated.detach())
        grads: list[Tensor | None] = [None] * 4
        if down is not None:
            # The rows of y are multiplied by their routing weights after this product.
            grad_rows.mul_(row_weights)
            grad_xa.mul_(row_weights)
            grads[2:] = down.gradients(activated.detach(), grad_rows, down_xa, grad_xa, counts)
        del grad_rows, grad_xa
        grad_act.mul_(row_weights)
        (grad_inner,) = torch.autograd.grad(activated, inner, grad_act)
        del activated, grad_act
        grad_x, grad_xa = experts.stack(experts.up_name).grad_input(grad_inner, counts, up)
        if up is not None:
            rows = x[order // num_active]
            grads[:2] = up.gradients(rows, grad_inner, up_xa, grad_xa, counts)
            del rows
        del grad_inner, grad_xa
        in_order = torch.empty_like(grad_weights).index_copy_(0, order, grad_weights)
        grad_weights = in_order.view(weights.shape).to(weights.dtype)
        grad_x = sum_over_experts(grad_x, order, num_active)
        return (grad_x, grad_weights, None, None, None, *grads)


def _adapters(
    factors: Sequence[Tensor | None], scalings: Sequence[float | None]
) -> Iterator[StackLora | None]:
    """Yield the adapter of each projection from A and B of both."""
    for a, b, scaling in zip(factors[::2], factors[1::2], scalings, strict=True):
        if a is None or b is None or scaling is None:
            yield None
        else:
            yield StackLora(a, b, scaling)


def _grad_weights(
    experts: Experts, counts: Sequence[int], grad_rows: Tensor, grad_act: Tensor, activated: Tensor
) -> Tensor:
    """Return the gradient (n,) of each row's routing weight: its output times the gradient."""
    grad_weights = (grad_act * activated).sum(dim=-1)
    if (bias := experts.bias(DOWN_NAME)) is not None:
        numbers = torch.repeat_interleave(
            torch.arange(experts.num_experts, device=grad_rows.device),
            torch.tensor(counts, device=grad_rows.device),
            output_size=grad_rows.shape[0],
        )
        grad_weights += (grad_rows * bias[numbers].to(grad_rows.dtype)).sum(dim=-1)
    return grad_weights


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
