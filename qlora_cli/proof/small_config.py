"""Shrinks the config of a base, so that its model type can be tested on a CPU in seconds.

Every choice that decides which code runs is kept: kinds of layers, biases, multipliers, the ratio
of heads and key-value heads, partial rotary dimensions. Only sizes get smaller, and soft caps,
which have no effect on the small values of a small model otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIZES: Mapping[str, int] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    "expansion_ratio": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "head_dim": 16,
    "rotary_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "original_max_position_embeddings": 32,
    "sliding_window": 4,
}
"""Key of a config -> its value in the small config, if the base's value is larger."""
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_SMALL_SOFT_CAP = 2.0
_MIN_LAYERS = 2


def small_config(config: Any) -> Any:
    """Return a small config of the same class.

    config: transformers' config of a base; it is not modified.
    """
    content = config.to_dict()
    changes: dict[str, Any] = {
        key: min(size, content[key])
        for key, size in SIZES.items()
        if isinstance(content.get(key), int) and not isinstance(content[key], bool)
    }
    changes |= _layers(content)
    changes |= _key_value_heads(content)
    changes |= {key: _SMALL_SOFT_CAP for key in _SOFT_CAPS if content.get(key)}
    changes |= {key: index for index, key in enumerate(_TOKENS) if content.get(key) is not None}
    if isinstance(rope := content.get("rope_parameters"), Mapping):
        changes["rope_parameters"] = _rope(rope, content, changes)
    kept = {key: value for key, value in content.items() if key not in _NOT_ARGUMENTS}
    return type(config)(**{**kept, **changes})


_NOT_ARGUMENTS = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype")


def _layers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of layers and the settings per layer: one layer of each kind."""
    key = next((key for key in _NUM_LAYERS if isinstance(content.get(key), int)), None)
    if key is None:
        return {}
    number = content[key]
    per_layer = {
        name: value
        for name, value in content.items()
        if isinstance(value, list | tuple) and len(value) == number and number > 1
    }
    kept = _kinds(list(per_layer.values()), number)
    return {key: len(kept), **{name: [v[i] for i in kept] for name, v in per_layer.items()}}


def _kinds(per_layer: Sequence[Sequence[Any]], number: int) -> list[int]:
    """Return the numbers of layers that contain every kind of layer, two at least, in order."""
    kinds: dict[str, int] = {}
    for index in range(number):
        kinds.setdefault(repr([values[index] for values in per_layer]), index)
    kept = set(kinds.values())
    kept |= {*[index for index in range(number) if index not in kept][: _MIN_LAYERS - len(kept)]}
    return sorted(kept)


def _key_value_heads(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of key-value heads: as many as heads, one, or a group of two heads each."""
    heads = next((content[key] for key in _HEADS if content.get(key)), None)
    changes: dict[str, int] = {}
    for key in _KEY_VALUE_HEADS:
        number = content.get(key)
        if number is not None:
            changes[key] = 4 if number == heads else 1 if number == 1 else 2
    return changes


def _rope(
    rope: Mapping[str, Any], content: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the rotary settings with as many factors as the small head has frequencies."""
    result: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, Mapping):
            result[key] = _rope(value, content, changes)
        elif key == "original_max_position_embeddings":
            result[key] = min(value, SIZES[key])
        elif isinstance(value, list):
            result[key] = value[: _num_frequencies(rope, content, changes)]
        else:
            result[key] = value
    return result


def _num_frequencies(
    rope: Mapping[str, Any], content: Mapping[str, Any], changes: Mapping[str, Any]
) -> int:
    heads = next(changes[key] for key in _HEADS if key in changes)
    head_size = changes.get("head_dim") or changes["hidden_size"] // heads
    return int(head_size * rope.get("partial_rotary_factor", 1.0)) // 2
