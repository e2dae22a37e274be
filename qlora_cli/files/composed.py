"""Configs of composed models, such as vision and text, whose language model is trained.

The package uses the config of the language model only. That object remembers the whole config,
which transformers needs to build the model.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

TEXT = "text_config"
"""Key of a composed config that contains the config of the language model."""
WHOLE = "_composed"
"""Attribute of a language model's config that contains the whole config."""


def language_config(config: Any) -> Any:
    """Return the config of the language model in a composed config; any other config unchanged.

    config: transformers' config; it is not modified.
    """
    if not hasattr(getattr(config, TEXT, None), "to_dict"):
        return config
    text = deepcopy(config.text_config)
    # The dtype of the parts may be that of an earlier form of the checkpoint.
    text.dtype = config.dtype or text.dtype
    # The class of the whole model ties its head by the whole config.
    tied = getattr(config, "tie_word_embeddings", None)
    own = getattr(text, "tie_word_embeddings", False)
    text.tie_word_embeddings = bool(own if tied is None else tied)
    text.__dict__[WHOLE] = deepcopy(config)
    return text


def is_composed(config: Any) -> bool:
    """Return whether a config is that of the language model of a composed model."""
    return WHOLE in vars(config)


def whole_config(config: Any) -> Any:
    """Return a copy of the config to build a model with: of the whole model if it is composed.

    config: of `language_config`; its current settings are those of the language model.
    """
    text = deepcopy(config)
    if not is_composed(config):
        return text
    whole = text.__dict__.pop(WHOLE)
    # transformers shares one object: settings of the language model are read from it.
    whole.text_config = text
    return whole


def model_type_of(config: Any) -> str:
    """Return the model type of a base: that of the whole model if it is composed."""
    whole = getattr(config, WHOLE, config)
    model_type: str = whole.model_type
    return model_type


def text_config_of(model: Any) -> Any:
    """Return the config of the language model in transformers' model, which may be composed."""
    return getattr(model.config, TEXT, model.config)
