"""The known model families, and the family of a config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.models.families.gpt2 import GPT2
from qlora_cli.models.families.llama import LLAMA, QWEN3
from qlora_cli.models.family import Family

FAMILIES = (LLAMA, QWEN3, GPT2)


def is_known(config: Any) -> bool:
    """Return whether a family covers the `model_type` of this transformers config."""
    return any(config.model_type in family.model_types for family in FAMILIES)


def family_of(config: Any, linears: Iterable[str] = ()) -> Family:
    """Return the family of a transformers config.

    linears: paths of the linears of one block, for the error message. Raises ModelError if no
    family covers the config's `model_type`.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    paths = ", ".join(linears) or "none"
    raise ModelError(
        f"model family {config.model_type!r} is not supported; supported are {known}",
        where="model.name",
        hint=f"use a base of a supported family instead, such as {_alternative(config)}. To add "
        "the family, describe it in a new file in qlora_cli/models/families/ and enter it in "
        f"qlora_cli/models/registry.py; linears of one block: {paths}",
    )


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
