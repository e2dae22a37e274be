"""The families that are written by hand, and supported bases to use in place of refused ones."""

from __future__ import annotations

from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.files.composed import is_composed, model_type_of
from qlora_cli.models.families.gpt2 import GPT2
from qlora_cli.models.families.llama import LLAMA, QWEN3
from qlora_cli.models.family import Family

FAMILIES = (LLAMA, QWEN3, GPT2)


def known_family(config: Any) -> Family | None:
    """Return the hand-written family of a transformers config; None if there is none.

    The language model of a composed model has other paths, so its family is derived.
    """
    if is_composed(config):
        return None
    return next((family for family in FAMILIES if config.model_type in family.model_types), None)


_ALTERNATIVES = (
    (1024, "HuggingFaceTB/SmolLM2-360M-Instruct (llama) or Qwen/Qwen3-0.6B (qwen3)"),
    (3072, "HuggingFaceTB/SmolLM2-1.7B-Instruct (llama) or Qwen/Qwen3-1.7B (qwen3)"),
)
"""(largest width of the refused base, supported bases of a similar size)."""
_LARGE_ALTERNATIVE = "Qwen/Qwen3-8B (qwen3) or Qwen/Qwen2.5-7B-Instruct (qwen2)"


def _alternative(config: Any) -> str:
    """Return supported bases of a size similar to that of a refused base."""
    width = getattr(config, "hidden_size", None) or 0
    fitting = (names for limit, names in _ALTERNATIVES if width <= limit)
    return next(fitting, _LARGE_ALTERNATIVE)


def unsupported(config: Any, reason: str) -> ModelError:
    """Return the error that refuses the model type of `config`, with a supported base to use."""
    return ModelError(
        f"model type {model_type_of(config)!r} is not supported: {reason}",
        where="model.name",
        hint=f"use a base of a supported type, such as {_alternative(config)}",
    )


_REFUSED = {
    "reformer": "its reversible layers compute gradients with a backward pass of their own",
    "prophetnet": "it predicts several of the next tokens at once, each with attention of its own",
    "xlm": "its forward pass depends on the values of tensors, so that it cannot be planned",
    "xlnet": "it has no causal attention: it predicts the tokens of a row in any order",
    "blt": "it groups bytes to patches that depend on the text, so that it cannot be planned",
}
"""Model type -> the reason why it is not supported."""


def refuse_by_name(config: Any) -> None:
    """Raise ModelError for a model type that is known not to be supported."""
    if (reason := _REFUSED.get(config.model_type)) is not None:
        raise unsupported(config, reason)
