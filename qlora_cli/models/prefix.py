"""Puts a trained prefix of keys and values before the rows of a model (`nn/prefix.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.peft_prefix import read_prefix
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.memory.scopes import module_scope, scope
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.prefix import SUBMODULE, BlockPrefix, prefix_of

MODEL_TYPES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""The model types with a prefix; tests compare each of them with PEFT."""


def block_prefixes(model: nn.Module) -> list[BlockPrefix]:
    """Return the prefix of each block, in order; none if the model has no prefix."""
    return [module for module in model.modules() if isinstance(module, BlockPrefix)]


def create_prefix(
    loaded: LoadedModel, length: int, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    """Draw a prefix of `length` keys and values for every block, on `device`.

    Raises UsageError if the model's type is not supported.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, size = _head_sizes(loaded.config)
    with scope("adapter"):
        for path in _attention_paths(loaded):
            with module_scope(path):
                shape = (length, heads, size)
                prefix = BlockPrefix.drawn(shape, dtype, device, generator)
                loaded.model.get_submodule(path).register_module(SUBMODULE, prefix)
    _shift_positions(loaded)


def attach_prefix(
    loaded: LoadedModel, folder: Path, device: torch.device, *, is_switched: bool = True
) -> None:
    """Replace the prefix of a model by the one in `folder`, frozen. device: that computes.

    is_switched: it has no effect while the model has no adapter. False for a merged model.

    Raises ModelError if it is damaged or does not fit the model.
    """
    stored, paths = read_prefix(folder), _attention_paths(loaded)
    needed = (len(paths), *_head_sizes(loaded.config))
    if stored.shape != needed:
        raise ModelError(
            f"the prefix has (blocks, heads, head size) {stored.shape}; the base has {needed}",
            where=str(folder),
        )
    has_prefix = bool(block_prefixes(loaded.model))
    for index, path in enumerate(paths):
        prefix = BlockPrefix(*(tensor.to(device) for tensor in stored.block(index)))
        prefix.is_switched = is_switched
        module = loaded.model.get_submodule(path)
        module.register_module(SUBMODULE, prefix.requires_grad_(False).eval())
    if not has_prefix:
        _shift_positions(loaded)


@torch.no_grad()
def load_prefix(loaded: LoadedModel, folder: Path | None) -> None:
    """Copy stored values into the prefix that a model has. folder: None if none is stored.

    Raises ModelError if only one of the two exists or their sizes differ.
    """
    prefixes = block_prefixes(loaded.model)
    stored = None if folder is None else read_prefix(folder)
    found = 0 if stored is None else stored.length
    needed = prefixes[0].length if prefixes else 0
    if found != needed:
        raise ModelError(
            f"its prefix has {found} virtual tokens, and adapter.prefix is {needed}",
            where=str(folder) if folder is not None else None,
        )
    for index, prefix in enumerate(prefixes):
        assert stored is not None
        if index == 0 and stored.shape != (len(prefixes), *prefix.key.shape[1:]):
            raise ModelError("its prefix belongs to another base", where=str(folder))
        key, value = stored.block(index)
        prefix.key.copy_(key)
        prefix.value.copy_(value)


def activate_prefix(model: nn.Module, is_active: bool) -> None:
    """Turn the prefix of a model on or off. One that belongs to a merged model stays on."""
    for prefix in block_prefixes(model):
        prefix.is_active = is_active or not prefix.is_switched


def prefix_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the keys and values of every block."""
    for prefix in block_prefixes(model):
        yield from prefix.parameters()


def _attention_paths(loaded: LoadedModel) -> list[str]:
    """Return the path of the attention of every block. Raises UsageError if not supported."""
    model_type = getattr(loaded.config, "model_type", "")
    if model_type not in MODEL_TYPES or loaded.family.is_classifier:
        raise UsageError(
            f"models of the type {model_type} have no prefix",
            where="adapter.prefix",
            hint=f"omit it, or use a base of one of these types: {', '.join(MODEL_TYPES)}",
        )
    blocks = loaded.model.get_submodule(loaded.family.blocks)
    found = [path for path, module in blocks.named_modules() if _is_attention(module)]
    return [f"{loaded.family.blocks}.{path}" for path in found]


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module of a block is transformers' attention, which calls ours."""
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")


def _head_sizes(config: Any) -> tuple[int, int]:
    """Return (number of key/value heads, size of a head)."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def _shift_positions(loaded: LoadedModel) -> None:
    """Shift the positions of tokens by N while the prefix is active, by a hook on the backbone."""
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    # Not the prefix itself, which another one may replace.
    attention = loaded.model.get_submodule(_attention_paths(loaded)[0])
    hook = partial(_with_shifted_positions, attention)
    backbone.register_forward_pre_hook(hook, with_kwargs=True)


def _with_shifted_positions(
    attention: nn.Module, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of a backbone with positions that begin at N; None without a prefix.

    attention: that of the first block.
    """
    prefix = prefix_of(attention)
    if prefix is None:
        return None
    positions = named.get("position_ids")
    if positions is None:
        tokens = arguments[0] if arguments else named["input_ids"]
        cache = named.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        end = start + tokens.shape[1]
        positions = torch.arange(start, end, device=prefix.key.device)[None]
    return arguments, named | {"position_ids": positions + prefix.length}
