"""Small bases for classification, labelled rows and recipes for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from qlora_cli.recipe.classification import Classification
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.classification import ClassificationTask
from tests.helpers.runs import make_base, make_recipe, make_tokenizer

ENCODERS = (
    *("bert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "distilbert"),
    *("electra", "modernbert", "albert"),
)
DECODERS = ("llama", "qwen2", "gpt2", "gemma2")
TASK = ClassificationTask(Classification(kind="classes", labels=["a", "b", "c"]))
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 272,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def encoder_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """Return a small configuration of an encoder."""
    own: dict[str, Any] = {"distilbert": {"hidden_dim": 96}}.get(model_type, {})
    if model_type in ("electra", "albert"):
        own = {"embedding_size": 32}
    return AutoConfig.for_model(model_type, **{**_SIZES, **_SPECIAL, **own, **settings})


def make_encoder(folder: Path, model_type: str = "bert", **settings: Any) -> Path:
    """Write an encoder with random weights and a byte-level tokenizer, without a head."""
    torch.manual_seed(4)
    model = AutoModel.from_config(encoder_config(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_classified_base(folder: Path, model_type: str) -> Path:
    """Write a small encoder or decoder, without a classification head."""
    if model_type in DECODERS:
        return make_base(folder, model_type, spread=0.15)
    return make_encoder(folder, model_type)


def make_labelled_rows(file: Path, num: int = 24, *, pairs: bool = False) -> Path:
    """Write rows of two labels, which the first letter of the text decides, by a formula."""
    rows = []
    for row in range(num):
        label = ("low", "high")[(row * row + row // 3) % 2]
        length = 4 + (5 * row) % 9
        text = "".join(chr(97 + (7 * row + 3 * i * i + i) % 26) for i in range(length))
        fields = {"text": label[0] * 3 + text, "label": label}
        if pairs:
            fields["text_pair"] = text[::-1]
        rows.append(fields)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def classification_recipe(model: Path, rows: Path, **sections: Any) -> Recipe:
    """Return a recipe of `task: classification`, whose labels are open unless they are given."""
    return make_recipe(model, rows, task="classification", **sections)
