"""Finds the modules of a block that mix tokens without transformers' interface for attention."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import nn

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_MIXER = re.compile("attention$|attn$|mixer$|shortconv$|lstmlayer$|recurrentblock$|^rwkv", re.I)
"""Class names of modules that mix tokens."""
_POSITIONS = re.compile("Position(al)?Embedding$")


def mixers_of(blocks: Sequence[nn.Module], own_attention: bool) -> Iterator[str]:
    """Yield the paths, within a block, of the modules that need one row at a time.

    own_attention: the interface does not call this package's attention.
    """
    found = (path for block in blocks for path in _mixers_in(block, "", own_attention))
    yield from dict.fromkeys(found)


def _mixers_in(module: nn.Module, prefix: str, own_attention: bool) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        is_separate = _is_mixer(child) and (own_attention or not _uses_interface(child))
        if is_separate or _has_convolution(child):
            yield path
        else:
            yield from _mixers_in(child, f"{path}.", own_attention)


def position_tables(backbone: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the paths, within the backbone, of modules outside the blocks that count positions."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for path, module in backbone.named_modules():
        if id(module) not in inside and _POSITIONS.search(type(module).__name__):
            yield path


def _is_mixer(module: nn.Module) -> bool:
    return _MIXER.search(type(module).__name__) is not None


def _has_convolution(module: nn.Module) -> bool:
    """Return whether a module itself computes with a convolution or a state-space matrix."""
    own = any(isinstance(child, nn.Conv1d) for child in module.children())
    return own or hasattr(module, "A_log")


def _uses_interface(module: nn.Module) -> bool:
    """Return whether a module or a part of it calls transformers' interface for attention."""
    kinds: set[Any] = {type(part) for part in module.modules()}
    return any(map(_calls_interface, kinds))


@cache
def _calls_interface(kind: Any) -> bool:
    if not kind.__module__.startswith("transformers."):
        return False
    return _INTERFACE in inspect.getsource(kind)
