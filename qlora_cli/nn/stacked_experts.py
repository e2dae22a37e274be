"""Experts with trained weights, for full fine-tuning, registered with transformers.

The weights stay in transformers' stacked parameters. The tokens are sorted by expert, as in
`experts.py`, so that a dry run can plan the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ExpertsInterface

from qlora_cli.nn.experts import DOWN_NAME, UP_NAMES, rows_per_expert, sum_over_experts

NAME = "qlora"
"""Name under which transformers finds this function (`experts_implementation`)."""


def run_stacked_experts(
    module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Map hidden states (T, d), expert numbers (T, k) and their weights (T, k) to (T, d).

    module: transformers' module with the stacked weights.
    """
    num_active = index.shape[-1]
    order = index.flatten().argsort(stable=True)
    counts = rows_per_expert(index, module.num_experts)
    up_name = next(name for name in UP_NAMES if hasattr(module, name))
    inner = _product(module, up_name, hidden_states[order // num_active], counts)
    activated = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    y = _product(module, DOWN_NAME, activated, counts)
    y = y * weights.flatten()[order].to(y.dtype)[:, None]
    return sum_over_experts(y, order, num_active)


def _product(module: nn.Module, name: str, x: Tensor, counts: Sequence[int]) -> Tensor:
    """Return x W^T + b of rows (n, in) that are sorted by expert."""
    # Unbound and not indexed: the gradient of an index has the size of the complete stack.
    matrices: Any = getattr(module, name).unbind(0)
    biases: Any = [None] * len(matrices)
    if (stacked := getattr(module, f"{name}_bias", None)) is not None:
        biases = stacked.unbind(0)
    outputs = [
        functional.linear(rows, matrix.t() if module.is_transposed else matrix, bias)
        for rows, matrix, bias in zip(x.split(list(counts)), matrices, biases, strict=True)
    ]
    return torch.cat(outputs)


ExpertsInterface.register(NAME, run_stacked_experts)
