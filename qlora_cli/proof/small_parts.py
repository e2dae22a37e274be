"""Shrinks the parts of a composed model's config next to its language model.

The proof never runs them. They only have to be created and stored, so that the merged checkpoint
has to keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from qlora_cli.files.composed import TEXT
from qlora_cli.proof.sizes import SIZES

_CHANNELS = ("nemo_conv_channels", "ext_pw_out_channel", "depthwise_separable_out_channel")
_SIZES = {
    **SIZES,
    "depth": 2,
    "embed_dim": 64,
    "num_hidden_layers": 2,
    "out_hidden_size": SIZES["hidden_size"],
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size"), SIZES["hidden_size"]),
    "adapter_out_dim": SIZES["hidden_size"],
    "image_size": 28,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "mm_tokens_per_image": 1,
    "base_channels": 32,
    "codebook_size": 64,
    "num_blocks": 2,
    **dict.fromkeys(_CHANNELS, SIZES["hidden_size"]),
}
_INDICES = ("fullatt_block_indexes", "deepstack_visual_indexes")


def small_whole(whole: Any) -> Any:
    """Return a copy of a composed config with small parts, except the language model."""
    small = deepcopy(whole)
    for key, part in small_parts(whole).items():
        setattr(small, key, part)
    return small


def small_parts(config: Any) -> dict[str, Any]:
    """Return key -> small config of each part of a config, except the language model."""
    keys = [k for k, value in config.to_dict().items() if isinstance(value, Mapping) and k != TEXT]
    parts = {key: getattr(config, key, None) for key in keys}
    return {key: _small_part(part) for key, part in parts.items() if hasattr(part, "to_dict")}


def _small_part(part: Any) -> Any:
    """Return a small config of the same class."""
    content = part.to_dict()
    changes: dict[str, Any] = {
        key: min(size, content[key])
        for key, size in _SIZES.items()
        if isinstance(content.get(key), int) and not isinstance(content[key], bool)
    }
    changes |= {key: [0] for key in _INDICES if content.get(key)}
    changes |= _first_layers(content, changes)
    kept = {k: v for k, v in content.items() if k not in ("model_type", "transformers_version")}
    return type(part)(**{**kept, **changes})


def _first_layers(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings per layer of the layers that are left."""
    old, number = (items.get("num_hidden_layers") for items in (content, changes))
    if number is None:
        return {}
    result: dict[str, Any] = {
        key: value[:number]
        for key, value in content.items()
        if isinstance(value, list) and len(value) == old
    }
    if overrides := content.get("per_layer_config"):
        kept = {int(index): values for index, values in overrides.items() if int(index) < number}
        result["per_layer_config"] = kept
    return result
