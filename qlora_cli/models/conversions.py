"""Tensors of a checkpoint that transformers renames, or stacks to one parameter, when it loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from qlora_cli.models.registry import unsupported
from qlora_cli.nn.experts import StackPart

Stacks = Mapping[str, tuple[StackPart, ...]]
"""Name of a stacked parameter (E, out, in) -> its parts in a checkpoint."""


def parameter_names(model: Any, stacks: Stacks, others: Sequence[str] = ()) -> Callable[[str], str]:
    """Return the function from the name of a tensor in a checkpoint to its parameter's name.

    model: transformers' model. stacks: its stacked parameters, whose parts keep their names. The
    others: paths of modules whose tensors are not loaded: they keep the names of the file inside
    such a path. The function raises ModelError for another tensor that transformers splits or
    merges.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters: list[Any] = [one for one in transforms if not isinstance(one, WeightRenaming)]
    names = dict.fromkeys(model.state_dict(), True)
    parts = {part.name for found in stacks.values() for part in found}
    inside = tuple(f"{path}." for path in others)

    def rename(name: str) -> str:
        if name in parts:
            return name
        renamed, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, names
        )
        if others and renamed.startswith(inside):
            return renamed if converter is None else f"{others[0]}.{name}"
        if converter is not None and renamed not in names:
            raise unsupported(
                model.config, f"transformers merges or splits {name} when it loads it"
            )
        return str(renamed)

    return rename


def stacked_parts(model: Any, parameters: Mapping[str, Tensor]) -> Stacks:
    """Return the parts of stacked parameters (E, out, in) in a checkpoint.

    parameters: name -> parameter of `model`, on meta. A parameter that a checkpoint stores whole is
    left out. transformers converts small stacks of numbers, which show where each number goes.
    Raises ModelError for parts that are not rows of one expert's matrix.
    """
    codes = {
        name: torch.arange(p.shape[0] * 4, device="cpu").view(-1, 2, 2)
        for name, p in parameters.items()
    }
    names = dict(enumerate(codes))
    largest = max((code.numel() for code in codes.values()), default=0)
    marked = {name: codes[name] + index * largest for index, name in names.items()}
    stacks: dict[str, list[StackPart]] = {}
    for file_name, part in revert_weight_conversion(model, marked).items():
        parameter = names[int(part.flatten()[0]) // largest]
        if part.dim() == 3 and torch.equal(part, marked[parameter]):
            continue
        found = _part(file_name, part - list(codes).index(parameter) * largest, codes[parameter])
        if found is None:
            raise unsupported(model.config, f"{file_name} is not a part of one expert's matrix")
        stacks.setdefault(parameter, []).append(found)
    return {
        name: tuple(sorted(parts, key=lambda part: (part.expert, part.start)))
        for name, parts in stacks.items()
    }


def _part(name: str, found: Tensor, codes: Tensor) -> StackPart | None:
    """Return the part of the stack `codes` (E, 2, 2) that has the numbers of `found`."""
    expert = int(found.flatten()[0]) // 4
    for start, stop in ((0, 2), (0, 1), (1, 2)):
        if torch.equal(found, codes[expert, start:stop]):
            return StackPart(name, expert, start, stop)
    return None
