"""Replaces code of transformers that depends on the values of tensors, so that a plan can run it.

The law of the logits compares the replacements with transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from qlora_cli.nn.block_indexer import select_keys
from qlora_cli.nn.own_experts import EXPERTS


def replace_value_dependent(model: nn.Module) -> None:
    """Change the modules of `model` whose code depends on the values of tensors."""
    for module in model.modules():
        replacement = _FORWARDS.get(type(module).__name__)
        if replacement is not None:
            module.forward = partial(replacement, module)


def _indexer(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    past_key_values: Any,
) -> Tensor:
    """Run Qwen4's indexer; with cached keys, as in generation, transformers' own code."""
    if past_key_values is None:
        return select_keys(module, hidden_states, position_embeddings)
    arguments = (hidden_states, position_embeddings, attention_mask, past_key_values)
    out: Tensor = type(module).forward(module, *arguments)
    return out


_FORWARDS: dict[str, Callable[..., Any]] = {**EXPERTS, "Qwen4ExpTextQSAIndexer": _indexer}
"""Name of a class of transformers -> the function that replaces its forward method."""
