"""The further arguments with which transformers calls an attention function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qlora_cli.errors import ModelError

UNUSED_ARGUMENTS = {
    "position_ids": "the model has already applied the positions to queries and keys",
    "output_attentions": "attention weights are not returned, whether they are wanted or not",
    "output_router_logits": "it belongs to the router of experts",
    "use_cache": "the model has already added the cached keys and values",
    "deterministic": "it selects a variant of FlashAttention with the same result",
}
"""Arguments that transformers passes and that do not change the result, with the reason."""


def refuse_arguments(
    module: nn.Module, unsupported: Mapping[str, Any], others: Mapping[str, Any]
) -> None:
    """Raise ModelError for an attention call that this package would compute wrongly.

    module: transformers' attention. unsupported: named arguments that must be None. others: further
    arguments. None means that the model does not use the argument.
    """
    passed = {**unsupported, **others}
    passed.pop("is_causal", None)
    names = [
        name for name, value in passed.items() if value is not None and name not in UNUSED_ARGUMENTS
    ]
    refuse(module, names)


def is_causal(module: nn.Module, others: Mapping[str, Any]) -> bool:
    """Return whether an attention call is causal. others: its further arguments.

    The argument overrides the attribute, as in transformers' own attention functions.
    """
    argument = others.get("is_causal")
    return bool(getattr(module, "is_causal", True) if argument is None else argument)


def refuse(module: nn.Module, names: Sequence[str]) -> None:
    """Raise ModelError that names the arguments of a call which are not handled, if any."""
    if names:
        raise refusal(module, ", ".join(sorted(names)))


def refusal(module: nn.Module, what: str) -> ModelError:
    """Return the error of a call that this package does not support. what: its arguments."""
    return ModelError(
        f"{type(module).__name__} calls the attention with {what}, which this package does not "
        "support",
        where="model.name",
        hint="handle it in qlora_cli/nn/attention.py, with a test against transformers' eager "
        "attention",
    )
