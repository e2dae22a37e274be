"""The configurations that plan and run are compared on, and weights made on the spot for them."""

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
"""Of the weights as they lie in the imagined checkpoint."""

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
"""Config fields of transformers; 1B is Llama 3.2's, 8B and 70B are Llama 3.1's."""
_GPT2_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 1024},
    "small": {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 2048},
}


@dataclass(frozen=True)
class Case:
    """One configuration. changes: overrides of the recipe, as on the command line."""

    family: str
    shape: str
    changes: tuple[str, ...] = ()
    vocab_size: int | None = None
    tied: bool | None = None

    @property
    def name(self) -> str:
        """Says all that the case is."""
        vocabulary = [f"vocab={self.vocab_size}"] if self.vocab_size else []
        tied = ["tied"] if self.tied else []
        return " ".join([self.family, self.shape, *vocabulary, *tied, *self.changes])

    def config(self) -> Any:
        """transformers' config, a new one each time, because building a model changes it."""
        sizes = (_GPT2_SHAPES if self.family == "gpt2" else _SHAPES)[self.shape]
        own: dict[str, Any] = {"dtype": FILE_DTYPE, "bos_token_id": 1, "eos_token_id": 2}
        if self.vocab_size:
            own["vocab_size"] = self.vocab_size
        if self.tied is not None:
            own["tie_word_embeddings"] = self.tied
        return AutoConfig.for_model(self.family, **{**sizes, **own})

    def recipe(self) -> Recipe:
        """The recipe, `auto` not yet resolved; two micro-batches stand for any number."""
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


def window_of(recipe: Recipe, config: Any) -> list[Batch]:
    """The largest micro-batches that the recipe allows, as many as a plan looks at."""
    batch = largest_batch(recipe.data.seq_len, recipe.train.micro_batch, config.vocab_size)
    return [batch] * min(2, recipe.train.grad_accum)


class MadeSource(MetaSource):
    """A checkpoint's tensors, each made on the host when it is asked for; no file is needed.

    touched: whether they get values. Under a stand-in for the card nobody reads them, and memory
    that is never written costs nothing, which is why 70 B parameters can be made.
    """

    def __init__(self, model: Any, family: Family, touched: bool) -> None:
        super().__init__(model, family, FILE_DTYPE)
        self._touched = touched

    def read(self, name: str) -> Tensor:
        """A new tensor; norms' weights are one, other vectors zero, matrices small and random."""
        tensor = torch.empty(self.shape(name), dtype=FILE_DTYPE)
        if not self._touched:
            return tensor
        if tensor.dim() == 1:
            return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        # By numpy, so that the values themselves never look like memory of the job.
        flat, values = tensor.view(-1).numpy(), matrix_values()
        for start in range(0, flat.size, values.size):
            part = flat[start : start + values.size]
            part[:] = values[: part.size]
        return tensor


@cache
def matrix_values() -> np.ndarray[Any, Any]:
    """Repeated through all matrices; a prime number of them, so that no two rows are the same."""
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
"""What the CPU's grid varies; empty is the default."""
_TIMES = 3
"""How often each pair of settings meets, where it can."""
_LOGITS = {"": 7e7, "base.compute_dtype=bfloat16": 2.2e7, "base.compute_dtype=float16": 4.2e6}
"""Tokens x vocabulary that a CPU multiplies in seconds; few have units for 16 bit."""


@cache
def cpu_grid() -> tuple[Case, ...]:
    """Configurations in which every two values of any two settings meet, made from a fixed seed.

    Never drawn is what a recipe refuses (an adapter of full fine-tuning, 8-bit Adam on 16-bit
    weights) and what takes minutes.
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


def _compatible(one: str, other: str) -> bool:
    both = f"{one} {other}"
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
    """Small shapes in all settings, then real ones; the largest fit a card of 80 GiB."""
    small = [Case(family, "small", tuple(text.split()), 32000) for family, text in _SMALL]
    vocabularies = [
        Case("llama", "small", tuple(text.split()), size, tied)
        for size, tied, text in _VOCABULARIES
    ]
    real = [Case("llama", shape, tuple(text.split())) for shape, text in _REAL]
    return (*small, *vocabularies, *real)


_ALL = "adapter.targets=all"
_KEPT = "train.activation_checkpointing=false"
_INT8 = "base.bits=8 base.outlier_threshold=0"
"""Outlier columns depend on the data, which a plan cannot know; it takes their bound."""
_SMALL = (
    ("llama", "data.seq_len=512"),
    ("llama", f"data.seq_len=512 {_ALL} {_KEPT}"),
    ("llama", "data.seq_len=512 base.double_quant=false base.quant_type=fp4"),
    ("llama", f"data.seq_len=512 {_INT8}"),
    ("llama", f"data.seq_len=256 train.micro_batch=4 {_INT8} {_ALL} {_KEPT}"),
    ("llama", "data.seq_len=512 base.bits=16"),
    ("llama", f"data.seq_len=256 train.micro_batch=4 base.bits=16 {_ALL} {_KEPT}"),
    ("llama", "data.seq_len=512 base.bits=16 adapter.method=full"),
    ("llama", f"data.seq_len=512 base.bits=16 adapter.method=full {_KEPT}"),
    ("llama", "data.seq_len=512 base.compute_dtype=float32"),
    ("llama", f"data.seq_len=512 base.compute_dtype=float16 adapter.dtype=float16 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=paged_adamw adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 train.optimizer=paged_adamw8bit adapter.rank=64 {_ALL}"),
    ("llama", f"data.seq_len=512 adapter.dropout=0.1 {_ALL}"),
    ("llama", f"data.seq_len=128 train.micro_batch=8 adapter.dropout=0.1 {_KEPT}"),
    ("mistral", f"data.seq_len=256 train.micro_batch=4 {_ALL}"),
    ("qwen2", f"data.seq_len=512 {_ALL} {_KEPT}"),
    ("qwen3", f"data.seq_len=512 {_ALL} {_KEPT}"),
    ("gpt2", "data.seq_len=512"),
    ("gpt2", f"data.seq_len=256 train.micro_batch=4 {_ALL} {_KEPT}"),
    ("gpt2", f"data.seq_len=512 {_INT8}"),
    ("gpt2", "data.seq_len=512 base.bits=16 adapter.method=full"),
)
_VOCABULARIES = (
    (8192, False, "data.seq_len=1024"),
    (64000, True, "data.seq_len=512"),
    (128256, False, f"data.seq_len=512 {_ALL}"),
    (128256, True, f"data.seq_len=512 base.bits=16 adapter.method=full {_KEPT}"),
)
_REAL = (
    ("1B", f"data.seq_len=1024 train.micro_batch=4 {_ALL}"),
    ("1B", f"data.seq_len=2048 {_KEPT}"),
    ("1B", f"data.seq_len=2048 {_INT8} {_ALL}"),
    ("1B", f"data.seq_len=2048 base.bits=16 train.optimizer=adamw8bit {_ALL}"),
    ("1B", "data.seq_len=512 base.bits=16 adapter.method=full"),
    ("1B", f"data.seq_len=32768 {_ALL}"),
    ("8B", "data.seq_len=2048"),
    ("8B", f"data.seq_len=2048 {_ALL}"),
    ("8B", f"data.seq_len=1024 train.micro_batch=4 {_ALL}"),
    ("8B", f"data.seq_len=1024 {_ALL} {_KEPT}"),
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
"""Family and recipe's overrides; or shape and overrides."""
