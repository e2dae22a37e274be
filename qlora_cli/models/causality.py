"""Refuses causal language models whose tokens attend to later ones."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_cli.files.composed import text_config_of
from qlora_cli.models.registry import unsupported


def check_causal(model: Any, backbone: nn.Module) -> None:
    """Raise ModelError for a causal language model whose tokens attend to later ones.

    Also for one whose attention changes with the length of a row.
    """
    if model.config.to_dict().get("attention_type") == "block_sparse" and hasattr(
        backbone, "set_attention_type"
    ):
        raise unsupported(
            model.config,
            "its attention is sparse for long rows only; write attention_type: original_full "
            "into config.json to train it with full attention",
        )
    can_be_encoder = "config.is_decoder" in inspect.getsource(type(backbone))
    is_encoder = can_be_encoder and not text_config_of(model).is_decoder
    if is_encoder and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise unsupported(
            model.config,
            "its config.json has no is_decoder: true, so each token attends to those after it; "
            "set task: classification to classify texts with it, or write is_decoder: true there "
            "if it is a causal language model",
        )
