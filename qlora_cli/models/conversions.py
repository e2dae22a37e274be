"""Names of checkpoint tensors that transformers renames when it loads a model (GPT-NeoX)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qlora_cli.models.registry import unsupported


def parameter_names(model: Any) -> Callable[[str], str]:
    """Return the function from the name of a tensor in a checkpoint to its parameter's name.

    model: transformers' model. The function raises ModelError for a tensor that transformers
    computes from several tensors, or splits.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters: list[Any] = [one for one in transforms if not isinstance(one, WeightRenaming)]
    names = dict.fromkeys(model.state_dict(), True)

    def rename(name: str) -> str:
        renamed, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, names
        )
        if converter is not None:
            raise unsupported(
                model.config, f"transformers merges or splits {name} when it loads it"
            )
        return str(renamed)

    return rename
