"""The configurations for which plan and run are compared, and synthetic weights for them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
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
            "train": {"grad_accum": 2},
        }
        for text in self.changes:
            override = parse_override(text)
            assert isinstance(override, Override), override
            section, _, key = override.key.partition(".")
            content.setdefault(section, {})[key] = override.value
        return Recipe.model_validate(content)


def step_batches_of(recipe: Recipe, config: Any) -> list[Batch]:
    """Return the largest micro-batches that the recipe allows, as many as a plan uses."""
    batch = largest_batch(recipe.data.seq_len, recipe.train.micro_batch, config.vocab_size)
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


FACTORS: Mapping[str, Sequence[str]] = {
    "family": ("llama", "mistral", "qwen2", "qwen3", "gpt2"),
    "base": (
        "",
        "base.double_quant=false base.quant_type=fp4",
        "base.bits=8",
        "base.bits=16",
        "base.bits=16 adapter.method=full",
    ),
    "compute": ("", "base.compute_dtype=bfloat16", "base.compute_dtype=float16"),
    "vocabulary": ("8192", "32000", "64000", "128256"),
    "tied": ("", "tied"),
    "tokens": ("128", "256", "512"),
    "micro_batch": ("1", "2", "3"),
    "checkpointing": ("", "train.activation_checkpointing=false"),
    "optimizer": ("", "train.optimizer=adamw8bit"),
    "adapter": (
        "",
        "adapter.rank=64 adapter.targets=all",
        "adapter.rank=16 adapter.targets=all adapter.dropout=0.1",
        "adapter.rank=4 adapter.dtype=float16",
    ),
}
"""Factor of the CPU grid -> its values; "" is the default of the recipe."""
_TIMES = 3
"""Number of cases in which each compatible pair of values occurs."""
_LOGITS = {"": 7e7, "base.compute_dtype=bfloat16": 2.2e7, "base.compute_dtype=float16": 4.2e6}
"""Largest tokens x vocabulary that a CPU multiplies in seconds; few CPUs have 16-bit units."""


@cache
def cpu_grid() -> tuple[Case, ...]:
    """Return cases in which every pair of values of any two factors occurs, from a fixed seed.

    Excluded are pairs that a recipe refuses (full fine-tuning with adapter settings, 8-bit Adam on
    16-bit weights) and cases that take minutes.
    """
    draw = random.Random(0)
    drawn = [_draw(draw) for _ in range(1500)]
    missing = {pair: _TIMES for row in drawn for pair in _pairs(row)}
    chosen: list[dict[str, str]] = []
    while True:
        best = max(drawn, key=lambda row: sum(missing[pair] > 0 for pair in _pairs(row)))
        met = [pair for pair in _pairs(best) if missing[pair] > 0]
        if not met:
            return tuple(_case_of(row) for row in chosen)
        for pair in met:
            missing[pair] -= 1
        chosen.append(best)
        drawn.remove(best)


def _draw(draw: random.Random) -> dict[str, str]:
    while True:
        row = {name: draw.choice(values) for name, values in FACTORS.items()}
        if _quick(row) and all(
            _compatible(*pair) for pair in itertools.combinations(row.values(), 2)
        ):
            return row


def _compatible(first: str, second: str) -> bool:
    both = f"{first} {second}"
    if "optimizer=adamw8bit" in both and ("method=full" in both or "adapter.dtype=float16" in both):
        return False
    return not ("method=full" in both and "adapter.rank" in both)


def _quick(row: Mapping[str, str]) -> bool:
    logits = int(row["tokens"]) * int(row["micro_batch"]) * int(row["vocabulary"])
    return logits <= _LOGITS[row["compute"]]


def _pairs(row: Mapping[str, str]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    return itertools.combinations(row.items(), 2)


def _case_of(row: Mapping[str, str]) -> Case:
    sizes = f"data.seq_len={row['tokens']} train.micro_batch={row['micro_batch']}"
    settings = ("base", "compute", "checkpointing", "optimizer", "adapter")
    return Case(
        row["family"],
        "small",
        tuple(" ".join([sizes, *(row[name] for name in settings)]).split()),
        vocab_size=int(row["vocabulary"]),
        tied=row["tied"] == "tied",
    )


def cuda_grid() -> tuple[Case, ...]:
    """Return small shapes in all settings, then real shapes; the largest fit a GPU of 80 GiB."""
    small = [Case(family, "small", tuple(text.split()), 32000) for family, text in _SMALL]
    vocabularies = [
        Case("llama", "small", tuple(text.split()), size, tied)
        for size, tied, text in _VOCABULARIES
    ]
    real = [Case("llama", shape, tuple(text.split())) for shape, text in _REAL]
    return (*small, *vocabularies, *real)


_ALL = "adapter.targets=all"
_NO_CHECKPOINTING = "train.activation_checkpointing=false"
_INT8 = "base.bits=8 base.outlier_threshold=0"
"""Without outlier columns: their number depends on the data, and a plan assumes its bound."""
_SMALL = (
    ("llama", "data.seq_len=512"),
    ("llama", f"data.seq_len=512 {_ALL} {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.double_quant=false base.quant_type=fp4"),
    ("llama", f"data.seq_len=512 {_INT8}"),
    ("llama", f"data.seq_len=256 train.micro_batch=4 {_INT8} {_ALL} {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.bits=16"),
    ("llama", f"data.seq_len=256 train.micro_batch=4 base.bits=16 {_ALL} {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.bits=16 adapter.method=full"),
    ("llama", f"data.seq_len=512 base.bits=16 adapter.method=full {_NO_CHECKPOINTING}"),
    ("llama", "data.seq_len=512 base.compute_dtype=float32"),
    ("llama", f"data.seq_len=512 base.compute_dtype=float16 adapter.dtype=float16 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=paged_adamw adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=paged_adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 adapter.dropout=0.1 {_ALL}"),
    ("llama", f"data.seq_len=128 train.micro_batch=8 adapter.dropout=0.1 {_NO_CHECKPOINTING}"),
    ("mistral", f"data.seq_len=256 train.micro_batch=4 {_ALL}"),
    ("qwen2", f"data.seq_len=512 {_ALL} {_NO_CHECKPOINTING}"),
    ("qwen3", f"data.seq_len=512 {_ALL} {_NO_CHECKPOINTING}"),
    ("gpt2", "data.seq_len=512"),
    ("gpt2", f"data.seq_len=256 train.micro_batch=4 {_ALL} {_NO_CHECKPOINTING}"),
    ("gpt2", f"data.seq_len=512 {_INT8}"),
    ("gpt2", "data.seq_len=512 base.bits=16 adapter.method=full"),
)
_VOCABULARIES = (
    (8192, False, "data.seq_len=1024"),
    (64000, True, "data.seq_len=512"),
    (128256, False, f"data.seq_len=512 {_ALL}"),
    (128256, True, f"data.seq_len=512 base.bits=16 adapter.method=full {_NO_CHECKPOINTING}"),
)
_REAL = (
    ("1B", f"data.seq_len=1024 train.micro_batch=4 {_ALL}"),
    ("1B", f"data.seq_len=2048 {_NO_CHECKPOINTING}"),
    ("1B", f"data.seq_len=2048 {_INT8} {_ALL}"),
    ("1B", f"data.seq_len=2048 base.bits=16 train.optimizer=adamw8bit {_ALL}"),
    ("1B", "data.seq_len=512 base.bits=16 adapter.method=full"),
    ("1B", f"data.seq_len=32768 {_ALL}"),
    ("8B", "data.seq_len=2048"),
    ("8B", f"data.seq_len=2048 {_ALL}"),
    ("8B", f"data.seq_len=1024 train.micro_batch=4 {_ALL}"),
    ("8B", f"data.seq_len=1024 {_ALL} {_NO_CHECKPOINTING}"),
    ("8B", f"data.seq_len=2048 train.micro_batch=2 {_INT8} {_ALL}"),
    ("8B", f"data.seq_len=2048 base.bits=16 {_ALL}"),
    ("8B", f"data.seq_len=2048 train.optimizer=paged_adamw8bit adapter.rank=64 {_ALL}"),
    ("8B", f"data.seq_len=2048 base.double_quant=false adapter.dropout=0.05 {_ALL}"),
    ("8B", f"data.seq_len=8192 {_ALL}"),
    ("8B", f"data.seq_len=32768 {_ALL}"),
    ("70B", "data.seq_len=2048"),
    ("70B", f"data.seq_len=2048 train.optimizer=adamw8bit {_ALL}"),
    ("70B", f"data.seq_len=8192 {_ALL}"),
    ("70B", f"data.seq_len=16384 {_ALL}"),
)
"""(shape, overrides); `_SMALL` has (family, overrides)."""
