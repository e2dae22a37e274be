"""Experts with code of their own that depends on the values of tensors, in a form that a plan runs.

These classes of transformers do not use its interface for experts: they look up which experts got
tokens. Here the tokens are sorted by expert first, as in `experts.py`, so that a dry run, which has
no values, can plan the memory. The weights stay in transformers' own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_cli.nn.experts import rows_per_expert, sum_over_experts


def has_own_experts(module: nn.Module) -> bool:
    """Return whether a module has experts with code of their own."""
    return type(module).__name__ in EXPERTS


def _run_sorted(
    compute: Callable[[int, Tensor], Tensor],
    num_experts: int,
    hidden_states: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Map hidden states (T, d), expert numbers (T, k) and their weights (T, k) to (T, d).

    compute: from the number of an expert and its rows (n, d) to its output (n, d).
    """
    num_active = index.shape[-1]
    order = index.flatten().argsort(stable=True)
    counts = rows_per_expert(index, num_experts)
    rows = hidden_states[order // num_active].split(counts)
    y = torch.cat([compute(expert, part) for expert, part in enumerate(rows)])
    y = y * weights.flatten()[order].to(y.dtype)[:, None]
    return sum_over_experts(y, order, num_active)


def _dbrx(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run DBRX's experts, whose weights are (E f, d). hidden_states: (1, T, d)."""
    mlp = module.mlp
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    # Unbound and not indexed: the gradient of an index has the size of all experts.
    matrices = [weight.view(shape).unbind(0) for weight in (mlp.w1, mlp.v1, mlp.w2)]

    def compute(expert: int, rows: Tensor) -> Tensor:
        out: Tensor = mlp(rows, *(of_expert[expert] for of_expert in matrices))
        return out

    flat = hidden_states.reshape(-1, module.hidden_size)
    y = _run_sorted(compute, module.num_experts, flat, top_k_index, top_k_weights)
    return y.view(hidden_states.shape)


def _longcat(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run LongCat's experts, of which those with the highest numbers return their input.

    Their tokens are computed by expert 0, too, with the weight 0: so the memory does not depend on
    how many they are.
    """
    number = module.num_routed_experts
    is_identity = top_k_index >= number
    gate_up, down = module.gate_up_proj.unbind(0), module.down_proj.unbind(0)

    def compute(expert: int, rows: Tensor) -> Tensor:
        gate, up = functional.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        return functional.linear(module.act_fn(gate) * up, down[expert])

    index = top_k_index.masked_fill(is_identity, 0)
    routed = top_k_weights.masked_fill(is_identity, 0.0)
    y = _run_sorted(compute, number, hidden_states, index, routed)
    kept = top_k_weights.masked_fill(~is_identity, 0.0).sum(dim=-1, keepdim=True)
    return y + hidden_states * kept.to(y.dtype)


def _jetmoe_router(module: Any, hidden_states: Tensor) -> tuple[Any, ...]:
    """Return what JetMoE's router returns: rows by expert, their tokens, weights and numbers."""
    logits = module.layer(hidden_states).float()
    top_logits, index = logits.topk(module.top_k, dim=1)
    weights = torch.softmax(top_logits, dim=1).type_as(hidden_states)
    order = index.flatten().argsort(stable=True)
    counts = rows_per_expert(index, module.num_experts)
    return order, order // module.top_k, weights.flatten()[order], counts, logits


EXPERTS: dict[str, Callable[..., Any]] = {
    "DbrxExperts": _dbrx,
    "LongcatFlashExperts": _longcat,
    "JetMoeTopKGating": _jetmoe_router,
}
"""Name of a class of transformers -> the function that replaces its forward method."""
