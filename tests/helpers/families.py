"""A small configuration for each supported model type, derived from the registry of families."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from qlora_cli.models.registry import FAMILIES

MODEL_TYPES = tuple(name for family in FAMILIES for name in family.model_types)
"""transformers' `model_type` of every supported architecture: tests are parametrized with it."""
LLAMA3_ROPE_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
"""Common names of the sizes; `attribute_map` of a config class translates them."""


def small_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """Return a configuration with two small blocks.

    Only the sizes that the configuration class has are set: GPT-2 has no key-value heads, for
    example. settings: take precedence over the sizes.
    """
    default = AutoConfig.for_model(model_type)
    aliases = default.attribute_map
    sizes = {name: size for name, size in _SIZES.items() if hasattr(default, name)}
    unset = {name: size for name, size in sizes.items() if aliases.get(name, name) not in settings}
    return AutoConfig.for_model(model_type, **{**unset, **settings})


def ties_embeddings(model_type: str) -> bool:
    """Return whether models of this type share the weights of embedding and head by default."""
    return bool(AutoConfig.for_model(model_type).tie_word_embeddings)


def as_in_file(model_type: str, weight: Tensor) -> Tensor:
    """Return the weight (out, in) of a linear as this model type's checkpoint files store it.

    The linears of a supported family are all stored as (out, in), or all as (in, out).
    """
    (family,) = (family for family in FAMILIES if model_type in family.model_types)
    (transposed,) = {linear.transposed for linear in family.linears}
    return weight.t() if transposed else weight
