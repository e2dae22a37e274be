"""The number of blocks in a config: its key has another name in some classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYER_KEYS = (
    *("decoder_layers", "num_blocks", "num_layers", "n_layers", "n_layer", "num_hidden_layers"),
)
"""In the order of precedence: BART's `num_hidden_layers` is that of its encoder."""


def layers_key(content: Mapping[str, Any]) -> str | None:
    """Return the key with the number of blocks; None if there is none. content: of a config."""
    return next((key for key in LAYER_KEYS if isinstance(content.get(key), int)), None)


def num_blocks(config: Any) -> int:
    """Return the number of blocks of a transformers config."""
    key = layers_key(config.to_dict())
    return int(getattr(config, key or "num_hidden_layers"))


def set_num_blocks(config: Any, number: int) -> None:
    """Set the number of blocks of a transformers config, under all of its names."""
    old = num_blocks(config)
    for key in LAYER_KEYS:
        if getattr(config, key, None) == old:
            setattr(config, key, number)
