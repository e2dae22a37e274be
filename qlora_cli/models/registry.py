"""Which family a config belongs to. An unknown one is an error that says how to write a spec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.models.families.gpt2 import GPT2
from qlora_cli.models.families.llama import LLAMA, QWEN3
from qlora_cli.models.family import Family

FAMILIES = (LLAMA, QWEN3, GPT2)


def is_known(config: Any) -> bool:
    """Whether `family_of` finds one."""
    return any(config.model_type in family.model_types for family in FAMILIES)


def family_of(config: Any, linears: Iterable[str] = ()) -> Family:
    """The family that a transformers config names by its `model_type`.

    linears: paths of the linear layers found in the model, for the error. Raises ModelError.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    found = ", ".join(linears) or "none"
    raise ModelError(
        f"model family {config.model_type!r} is not known; known are {known}",
        where="model.name",
        hint=(
            f"linears found in one block: {found}. A family is one file in qlora_cli/models/families/: "
            "a Family that names these linears' roles, entered in registry.py"
        ),
    )
