"""What a derived family cannot do, as notes for the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qlora_cli.files.quantized import BITSANDBYTES, MXFP4, stored_as
from qlora_cli.models.build import skeleton
from qlora_cli.models.registry import known_family


def limits_of(config: Any, model_class: Any) -> tuple[str, ...]:
    """Return one sentence for each limit of the model type of a config.

    config: transformers' config of a base. model_class: the transformers Auto class of the task.
    Raises ModelError if no family can describe the type.
    """
    notes = list(_stored(config))
    if known_family(config) is None:
        notes += _limits(config, model_class)
    return tuple(notes)


def _stored(config: Any) -> Iterator[str]:
    """Yield what happens to a checkpoint that is already quantized."""
    if stored_as(config) == MXFP4:
        yield (
            "the experts of this checkpoint are in MXFP4; they are dequantized exactly when they "
            "are read, one stack at a time, and quantized to base.bits like other weights"
        )
    if stored_as(config) == BITSANDBYTES:
        yield (
            "this checkpoint was quantized by bitsandbytes; weights in the format of the recipe's "
            "base are used as they are, others are dequantized and quantized again; their values "
            "differ from those of the 16-bit base that the checkpoint was made from"
        )


def _limits(config: Any, model_class: Any) -> Iterator[str]:
    model, family = skeleton(config, torch.float32, model_class)
    if not family.rows.packs and not family.is_classifier:
        yield (
            f"model type {family.name} runs one row at a time, because it adds tokens to its "
            "input; packing changes the order of rows, but saves no time"
        )
    elif mixers := family.rows.mixers:
        yield (
            f"the rows of a packed sequence run one at a time in {', '.join(mixers)} of "
            "each block that has it, and together in all other parts"
        )
    if family.others:
        yield (
            f"only the language model is trained; {', '.join(family.others)} are not loaded, and a "
            "merge copies them, so that it is larger than the planned figure"
        )
    if family.experts:
        number = _num_parameters(model, family.experts)
        yield (
            f"{number:,} parameters of experts are packed like the linears; they get adapters if "
            "adapter.targets contains experts; the router stays as it is"
        )
    if family.unquantized:
        number = _num_parameters(model, family.unquantized)
        yield (
            f"{number:,} parameters ({', '.join(family.unquantized)} of each block) stay in 16 bit "
            f"without an adapter, because the code of model type {family.name} reads these weights "
            "directly, or they have no effect that could be trained"
        )
    if family.kept_stacks:
        endings = tuple(f".{name}" for name in family.kept_stacks)
        names = [(n, p) for n, p in model.named_parameters() if n.endswith(endings)]
        yield (
            f"{sum(p.numel() for _, p in names):,} parameters ({', '.join(family.kept_stacks)} of "
            "each block) are experts with code of their own or have more than two dimensions; they "
            "stay in 16 bit without an adapter"
        )


def _num_parameters(model: Any, paths: tuple[str, ...]) -> int:
    """Return the number of parameters of the modules whose path ends with one of `paths`."""
    endings = tuple(f".{path}" for path in paths)
    modules = (module for name, module in model.named_modules() if name.endswith(endings))
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
