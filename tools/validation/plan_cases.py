"""The configurations for which plan and run are compared, and synthetic weights for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from qlora_cli.data.collate import Batch, largest_batch
from qlora_cli.models.family import Family
from qlora_cli.plan.meta_source import MetaSource
from qlora_cli.plan.planner import num_segments
from qlora_cli.recipe.override import Override, parse_override
from qlora_cli.recipe.schema import Recipe

FILE_DTYPE = torch.float16
"""Dtype of the weights in the synthetic checkpoint."""

_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 131072}
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
    },
    "1B": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8B": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "70B": _LLAMA_3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""Shape -> fields of a transformers config. 1B is Llama 3.2, 8B and 70B are Llama 3.1."""
_GPT2_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 1024},
    "small": {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 2048},
}


@dataclass(frozen=True)
class Case:
    """One configuration.

    family: transformers' model type. shape: key of the table of shapes. changes: overrides of the
    recipe, as on the command line. vocab_size, tied: replace the shape's own values.
    """

    family: str
    shape: str
    changes: tuple[str, ...] = ()
    vocab_size: int | None = None
    tied: bool | None = None

    @property
    def name(self) -> str:
        """A name that contains all settings of the case."""
        vocabulary = [f"vocab={self.vocab_size}"] if self.vocab_size else []
        tied = ["tied"] if self.tied else []
        return " ".join([self.family, self.shape, *vocabulary, *tied, *self.changes])

    def config(self) -> Any:
        """Return a new transformers config."""
        sizes = (_GPT2_SHAPES if self.family == "gpt2" else _SHAPES)[self.shape]
        own: dict[str, Any] = {"dtype": FILE_DTYPE, "bos_token_id": 1, "eos_token_id": 2}
        if self.vocab_size:
            own["vocab_size"] = self.vocab_size
        if self.tied is not None:
            own["tie_word_embeddings"] = self.tied
        return AutoConfig.for_model(self.family, **{**sizes, **own})

    def recipe(self) -> Recipe:
        """Return the recipe with unresolved `auto`. Two micro-batches represent any number."""
        content: dict[str, Any] = {
            "model": {"name": self.shape},
            "data": {"train": "none"},
            "train": {"grad_accum": 2, "activation_checkpointing": True},
        }
        for text in self.changes:
            override = parse_override(text)
            assert isinstance(override, Override), override
            section, _, key = override.key.rpartition(".")
            (content.setdefault(section, {}) if section else content)[key] = override.value
        return Recipe.model_validate(content)


def step_batches_of(recipe: Recipe, config: Any) -> list[Batch]:
    """Return the largest micro-batches that the recipe allows, as many as a plan uses."""
    sizes, segments = (recipe.data.seq_len, recipe.train.micro_batch), num_segments(recipe)
    batch = largest_batch(*sizes, config.vocab_size, segments=segments)
    return [batch] * min(2, recipe.train.grad_accum)


class SyntheticSource(MetaSource):
    """A checkpoint without a file: each tensor is created on the CPU when it is read.

    with_values: whether the tensors get values. A fake GPU does not read them, and memory that is
    never written takes no space, so a model with 70 B parameters is possible there.
    """

    def __init__(self, model: Any, family: Family, with_values: bool) -> None:
        super().__init__(model, family, FILE_DTYPE)
        self._with_values = with_values

    def read(self, name: str) -> Tensor:
        """Return a new tensor: weights of norms are one, other vectors zero, matrices random."""
        tensor = torch.empty(self.shape(name), dtype=FILE_DTYPE)
        if not self._with_values:
            return tensor
        if tensor.dim() == 1:
            return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        # numpy, so that the values themselves are not counted as memory of the job.
        flat, values = tensor.view(-1).numpy(), random_values()
        for start in range(0, flat.size, values.size):
            part = flat[start : start + values.size]
            part[:] = values[: part.size]
        return tensor


@cache
def random_values() -> np.ndarray[Any, Any]:
    """Return the values that all matrices repeat; a prime number, so that all rows differ."""
    values = np.random.default_rng(0).standard_normal(1_048_583, dtype=np.float32)
    return (0.02 * values).astype(np.float16)
