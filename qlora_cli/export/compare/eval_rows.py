"""Rows to judge a model on: held out where the recipe has such rows, and said plainly where not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.data.load import ModelLimits, load_examples
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import InputError
from qlora_cli.nn.loss import IGNORE_INDEX
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of

MAX_ROWS = 32
MAX_TOKENS = 2048
"""Judged at most: enough for a mean KL within some percent, few enough to wait for."""
_RANDOM_ROWS = 8
_RANDOM_TOKENS = 64


@dataclass(frozen=True)
class EvalRows:
    """rows: token ids and labels. origin: where they come from, in words.

    of_task: whether a loss on them says anything about the task.
    """

    rows: list[Example]
    origin: str
    is_task_data: bool
    notes: tuple[str, ...] = ()


def eval_rows(recipe: Recipe, base: Path, config: Any) -> EvalRows:
    """The recipe's held-out rows; else the last rows it was trained on; else random tokens.

    base: the folder of the tokenizer. What could not be read is told in `notes`.
    """
    notes: list[str] = []
    held_out = [(recipe.data.eval, False)] if recipe.data.eval else []
    for where, from_end in [*held_out, (recipe.data.train, True)]:
        try:
            rows = _read(where, recipe, base, config, from_end)
        except InputError as fault:
            notes.append(f"{where} cannot be judged on: {fault.what.rstrip(':')}")
            continue
        origin = f"{len(rows)} held-out rows of {where}"
        if from_end:
            origin = f"the last {len(rows)} training rows of {where}"
            notes.append(f"there are no held-out rows; judged on {origin}")
        return EvalRows(rows, origin, True, tuple(notes))
    notes.append("judged on random tokens, which say little about the task")
    return EvalRows(_random_rows(config), "random tokens", False, tuple(notes))


def _read(where: str, recipe: Recipe, base: Path, config: Any, from_end: bool) -> list[Example]:
    select = slice(-MAX_ROWS, None) if from_end else slice(MAX_ROWS)
    tokenizer, limits = load_tokenizer(str(base)), ModelLimits.of(config)
    encode = task_of(recipe).encode
    loaded = load_examples(where, recipe.data, tokenizer, limits, encode=encode, select=select)
    kept: list[Example] = []
    for example in loaded.examples:
        if kept and sum(len(row.ids) for row in kept) + len(example.ids) > MAX_TOKENS:
            break
        kept.append(example)
    return kept


def _random_rows(config: Any) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    length = min(_RANDOM_TOKENS, config.max_position_embeddings)
    shape = (_RANDOM_ROWS, length)
    ids = torch.randint(config.vocab_size, shape, generator=generator).tolist()
    return [Example(row, [IGNORE_INDEX, *row[1:]], "random") for row in ids]
