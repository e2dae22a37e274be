"""Shrinks the config of a base, so that its model type can be tested on a CPU in seconds.

Every choice that decides which code runs is kept: kinds of layers, biases, multipliers, the ratio
of heads and key-value heads, partial rotary dimensions. Only sizes get smaller, and soft caps,
which have no effect on the small values of a small model otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_cli.files.composed import WHOLE, is_composed, whole_config
from qlora_cli.files.quantized import STORED_AS
from qlora_cli.models.depth import LAYER_KEYS, layers_key
from qlora_cli.models.registry import unsupported
from qlora_cli.proof.sizes import ACTIVE_EXPERTS, SIZES
from qlora_cli.proof.small_parts import small_parts, small_whole

_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_STATE_HEADS = {
    "mamba_d_head": ("mamba_n_heads", "mamba_expand"),
    "mamba_head_dim": ("mamba_num_heads", "expand"),
    "mamba_headdim": ("n_mamba_heads", "mamba_expand"),
    "head_dim": ("num_heads", "expand"),
}
"""Head size of a state-space layer -> number of its heads, factor of the hidden size."""
_HEAD_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SMALL_SOFT_CAP = 2.0
_MIN_LAYERS = 2
_MAX_LAYERS = 8
_SOFT_CAP = re.compile("soft_?cap")
_PERIOD = re.compile("(_period|_step|_interval|_pattern)$")
_LAYER_NUMBERS = re.compile("(_idxs|_indices|_ids|_only_layers|^moe_layers)$")


def small_config(config: Any) -> Any:
    """Return a small config of the same class.

    config: transformers' config of a base; it is not modified. Raises ModelError for a model whose
    language model has parts of its own.
    """
    content = config.to_dict()
    content = {key: value for key, value in content.items() if key not in (WHOLE, STORED_AS)}
    if "text_config" in content:
        raise unsupported(config, "its language model has several parts")
    changes: dict[str, Any] = {
        **_sizes(content),
        **_key_value_heads(content),
        **small_parts(config),
    }
    changes |= _state_heads(content, changes)
    changes |= _wider_attention(content, changes)
    changes |= _layers(content, changes)
    changes |= {
        key: _SMALL_SOFT_CAP for key, value in content.items() if value and _SOFT_CAP.search(key)
    }
    changes |= {key: index for index, key in enumerate(_TOKENS) if content.get(key) is not None}
    if rates := content.get("compress_rates"):
        changes["compress_rates"] = {key: max(2, min(old // 2, 4)) for key, old in rates.items()}
    if isinstance(rope := content.get("rope_parameters"), Mapping):
        changes["rope_parameters"] = _rope(rope, content, changes)
    kept = {key: value for key, value in content.items() if key not in _NOT_ARGUMENTS}
    small = type(config)(**{**kept, **changes})
    if is_composed(config):
        small.tie_word_embeddings = config.tie_word_embeddings
        small.__dict__[WHOLE] = small_whole(whole_config(config))
    return small


def _sizes(content: Mapping[str, Any]) -> dict[str, int]:
    changes = {
        key: min(size, content[key])
        for key, size in SIZES.items()
        if isinstance(content.get(key), int) and not isinstance(content[key], bool)
    }
    has_heads = any(content.get(key) for key in _HEADS)
    if has_heads and "head_dim" in content and content["head_dim"] is None:
        changes["head_dim"] = SIZES["head_dim"]
    changes |= {key: SIZES[key] for key in ACTIVE_EXPERTS if content.get(key, 0) is None}
    if "qk_rope_head_dim" in changes:
        changes["head_dim"] = changes["qk_rope_head_dim"]
    return changes


_NOT_ARGUMENTS = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype")


def _layers(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of layers and the settings per layer: one layer of each kind."""
    key = layers_key(content)
    if key is None:
        return {}
    number = content[key]
    numbers = {name: value for name, value in content.items() if _is_layer_numbers(name, value)}
    per_layer = {
        name: value
        for name, value in content.items()
        if isinstance(value, list | tuple) and len(value) == number > 1 and name not in numbers
    }
    overrides = {int(i): v for i, v in (content.get("per_layer_config") or {}).items()}
    shared = content.get("num_kv_shared_layers") or 0
    kinds = [
        *per_layer.values(),
        *([index in value for index in range(number)] for value in numbers.values()),
        [overrides.get(index) for index in range(number)],
        [index >= number - shared for index in range(number)],
    ]
    period = max((content[name] or 0 for name in content if _is_period(name, content)), default=0)
    kept = _kinds(kinds, number, min(max(period, _MIN_LAYERS), _MAX_LAYERS))
    kept = _with_shared(content, kept)
    result: dict[str, Any] = {name: len(kept) for name in LAYER_KEYS if content.get(name) == number}
    result |= {
        name: [_small(name, value[i], changes) for i in kept] for name, value in per_layer.items()
    }
    result |= {name: [kept.index(i) for i in value if i in kept] for name, value in numbers.items()}
    if overrides:
        result["per_layer_config"] = {
            kept.index(index): _small_overrides(values, content, changes)
            for index, values in overrides.items()
            if index in kept
        }
    if shared:
        result["num_kv_shared_layers"] = sum(index >= number - shared for index in kept)
    return result


def _with_shared(content: Mapping[str, Any], kept: list[int]) -> list[int]:
    """Return the numbers of the layers that are kept, with two of a kind that share weights.

    Zamba names the first of these layers by its number, so all layers up to the second one stay.
    """
    kinds = content.get("layers_block_type") or []
    hybrid = [index for index, kind in enumerate(kinds) if kind == "hybrid"]
    return list(range(hybrid[1] + 1)) if len(hybrid) > 1 else kept


def _is_layer_numbers(name: str, value: Any) -> bool:
    """Return whether a setting lists the numbers of some layers."""
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and bool(_LAYER_NUMBERS.search(name)) and all(isinstance(i, int) for i in value)


def _is_period(name: str, content: Mapping[str, Any]) -> bool:
    """Return whether a setting is the distance between layers of one kind."""
    return isinstance(content[name], int) and bool(_PERIOD.search(name))


def _small(name: str, value: Any, changes: Mapping[str, Any]) -> Any:
    """Return the small value of a setting of one layer."""
    if name in _KEY_VALUE_HEADS:
        return min(value, changes.get(name, value))
    return min(value, SIZES[name]) if name in SIZES and isinstance(value, int) else value


def _small_overrides(
    values: Mapping[str, Any], content: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the small values of the settings that one layer has instead of the common ones."""
    small = {
        name: _in_proportion(old, content.get(name), changes.get(name))
        for name, old in values.items()
    }
    # A head of latent attention consists of a part with positions and one without.
    large = {**content, **values}
    parts = [large.get(name) or 0 for name in _HEAD_PARTS]
    if all(parts) and large.get("head_dim") == sum(parts):
        small["head_dim"] = sum({**changes, **small}[name] for name in _HEAD_PARTS)
    return small


def _in_proportion(value: Any, common: Any, small: Any) -> Any:
    """Return the small value of a setting that one layer has instead of `common`.

    small: the small value of `common`. It must stay different, so that the layer stays different.
    """
    if isinstance(value, int) and isinstance(common, int) and isinstance(small, int):
        return max(1, value * small // common)
    return value


def _kinds(per_layer: Sequence[Sequence[Any]], number: int, at_least: int) -> list[int]:
    """Return the numbers of layers that contain every kind of layer, in order."""
    kinds: dict[str, int] = {}
    for index in range(number):
        kinds.setdefault(repr([values[index] for values in per_layer]), index)
    kept = set(kinds.values())
    kept |= {
        *[index for index in range(number) if index not in kept][: max(0, at_least - len(kept))]
    }
    return sorted(kept)


def _key_value_heads(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of key-value heads: as many as heads, one, or a group of two heads each."""
    heads = next((content[key] for key in _HEADS if content.get(key)), None)
    changes: dict[str, int] = {}
    for key in _KEY_VALUE_HEADS:
        number = content.get(key)
        if number is not None:
            changes[key] = 4 if number == heads else 1 if number == 1 else 2
        elif key in content and heads is not None:
            changes[key] = 4
    return changes


def _wider_attention(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of attention whose width is a multiple of the hidden size."""
    width = content.get("attention_hidden_size")
    if not width or "hidden_size" not in changes:
        return {}
    small = width * changes["hidden_size"] // content["hidden_size"]
    result = {"attention_hidden_size": small}
    if content.get("attention_head_dim"):
        result["attention_head_dim"] = small // changes["num_attention_heads"]
    return result


def _state_heads(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of the heads of state-space layers, which follow from other sizes."""
    result: dict[str, int] = {}
    for key, (heads, factor) in _STATE_HEADS.items():
        if content.get(key) and content.get(heads) and content.get(factor):
            inner = int(content[factor] * changes["hidden_size"])
            result[key] = inner // changes[heads]
            result |= {"mamba_d_ssm": inner} if content.get("mamba_d_ssm") else {}
    return result


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
        elif key == "mrope_section":
            total, number = sum(value), _num_frequencies(rope, content, changes)
            result[key] = [size * number // total for size in value]
            result[key][0] += number - sum(result[key])
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
