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
