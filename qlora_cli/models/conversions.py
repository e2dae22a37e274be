"""Tensors of a checkpoint that transformers renames, or stacks to one parameter, when it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


RowParts = Mapping[str, tuple[str, ...]]
"""Name of a parameter -> the tensors of a checkpoint that are its rows, in order."""
_SIZE = 4
"""Rows and columns of a matrix of codes: with two rows, interleaved halves would look in order."""
_NUM_CODES = 12
"""Divisible by the number of parts of a parameter."""


def parameter_names(
    model: Any, stacks: Stacks, row_parts: RowParts, others: Sequence[str] = ()
) -> Callable[[str], str]:
    """Return the function from the name of a tensor in a checkpoint to its parameter's name.

    model: transformers' model. stacks, row_parts: its parameters that a checkpoint stores in parts,
    which keep their names. others: paths of modules whose tensors are not loaded: they keep the
    names of the file inside such a path. The function raises ModelError for another tensor that
    transformers splits or merges.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters: list[Any] = [one for one in transforms if not isinstance(one, WeightRenaming)]
    names = dict.fromkeys(model.state_dict(), True)
    parts = {part.name for found in stacks.values() for part in found}
    inside = tuple(f"{path}." for path in others)
    parts |= {name for found in row_parts.values() for name in found}

    def rename(name: str) -> str:
        if name in parts:
            return name
        renamed, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, names
        )
        if others and renamed.startswith(inside):
            return renamed if converter is None else f"{others[0]}.{name}"
        if renamed not in names and name in names:
            # A pattern for tensors of blocks can match others, which transformers then keeps.
            return name
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
        name: torch.arange(p.shape[0] * _SIZE**2, device="cpu").view(-1, _SIZE, _SIZE)
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
            reason = f"{file_name} is not a part of one expert's matrix, in the order of its rows"
            raise unsupported(model.config, reason)
        stacks.setdefault(parameter, []).append(found)
    return {
        name: tuple(sorted(parts, key=lambda part: (part.expert, part.start)))
        for name, parts in stacks.items()
    }


def parts_of_rows(model: Any, parameters: Iterable[str]) -> RowParts:
    """Return the parts in a checkpoint of parameters that transformers concatenates.

    parameters: names, such as those of the weights of convolutions. A parameter that a checkpoint
    stores whole is left out. Raises ModelError for parts that are not consecutive rows.
    """
    marked = {
        name: torch.arange(_NUM_CODES, device="cpu")[:, None, None] + index * _NUM_CODES
        for index, name in enumerate(parameters)
    }
    names = list(marked)
    found: dict[str, dict[int, str]] = {}
    for file_name, part in revert_weight_conversion(model, dict(marked)).items():
        index, first = divmod(int(part.flatten()[0]), _NUM_CODES)
        if not torch.equal(part, marked[names[index]][first : first + len(part)]):
            raise unsupported(model.config, f"{file_name} is not a part of a parameter's rows")
        found.setdefault(names[index], {})[first] = file_name
    return {
        name: tuple(parts[first] for first in sorted(parts))
        for name, parts in found.items()
        if len(parts) > 1
    }


def _part(name: str, found: Tensor, codes: Tensor) -> StackPart | None:
    """Return the part of the stack `codes` (E, size, size) that has the numbers of `found`."""
    expert, half = int(found.flatten()[0]) // _SIZE**2, _SIZE // 2
    for start, stop in ((0, 2), (0, 1), (1, 2)):
        if torch.equal(found, codes[expert, start * half : stop * half]):
            return StackPart(name, expert, start, stop)
    return None
