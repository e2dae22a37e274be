"""Choose the rows that models are compared on.

These are the recipe's held-out rows. If there are none, the last training rows are used, and if
those cannot be read, random tokens. A note states which rows were used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.mixture import sources_text
from qlora_cli.data.positions import num_positions
from qlora_cli.data.template import with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import InputError
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import Data, Recipe
from qlora_cli.tasks.registry import task_of
from qlora_cli.units import format_rows

MAX_ROWS = 32
MAX_TOKENS = 2048
"""Limits for a comparison: enough for a mean KL within some percent, and quick to compute."""
_RANDOM_ROWS = 8
_RANDOM_TOKENS = 64


@dataclass(frozen=True)
class EvalRows:
    """Rows to compare models on.

    rows: token ids and labels.
    origin: which rows these are, as text for the user.
    is_task_data: False for random tokens, whose loss is meaningless for the task.
    are_pairs: whether the rows are the chosen and the rejected answer of each pair, in turn.
    notes: lines for the user about rows that could not be used.
    """

    rows: list[Example]
    origin: str
    is_task_data: bool
    notes: tuple[str, ...] = ()
    are_pairs: bool = False

    @property
    def signs(self) -> Tensor | None:
        """Return -1 for each target of a rejected answer and 1 for the others; None without pairs.

        Training raises the cross entropy of the former and lowers that of the others.
        """
        if not self.are_pairs:
            return None
        numbers = torch.tensor([row.num_targets for row in self.rows])
        return (1 - 2 * (torch.arange(len(self.rows)) % 2)).repeat_interleave(numbers)


@dataclass(frozen=True)
class Limits:
    """Largest number of rows, and of tokens in all of them."""

    rows: int = MAX_ROWS
    tokens: int = MAX_TOKENS


def eval_rows(recipe: Recipe, base: Path, config: Any, limits: Limits | None = None) -> EvalRows:
    """Return the rows to compare models on (see the module).

    recipe: the run's recipe.
    base: the base's folder, for its tokenizer.
    config: the base's transformers config.
    limits: None for those of a comparison.
    """
    held_out = [(sources_text(recipe.data.eval), False)] if recipe.data.eval else []
    sources = [*held_out, (sources_text(recipe.data.train), True)]
    return _rows_of(sources, recipe, base, config, limits or Limits())


def training_rows(recipe: Recipe, base: Path, config: Any, limits: Limits) -> EvalRows:
    """Return the last training rows, and never held-out ones. Arguments as of `eval_rows`."""
    return _rows_of([(sources_text(recipe.data.train), True)], recipe, base, config, limits)


def _rows_of(
    sources: Sequence[tuple[str, bool]], recipe: Recipe, base: Path, config: Any, limits: Limits
) -> EvalRows:
    """Return the rows of the first usable source. sources: (in words, whether for training)."""
    notes: list[str] = []
    for where, from_end in sources:
        try:
            rows = _read(recipe, base, config, from_end, limits)
        except InputError as fault:
            notes.append(f"{where} cannot be used for the comparison: {fault.what.rstrip(':')}")
            continue
        origin = f"{len(rows)} held-out rows of {where}"
        if from_end:
            origin = f"the last {len(rows)} training rows of {where}"
            notes.append(f"there are no held-out rows; the comparison uses {origin}")
        are_pairs = bool(task_of(recipe).segment_names)
        return EvalRows(rows, origin, True, tuple(notes), are_pairs)
    notes.append("the comparison uses random tokens, which are not typical of the task")
    return EvalRows(_random_rows(config), "random tokens", False, tuple(notes))


def file_rows(where: str, folder: Path, config: Any) -> EvalRows:
    """Return the first rows of a data file to compare models on.

    where: a file or dataset with rows in any known format. folder: the model's folder, for its
    tokenizer. config: the model's transformers config.

    Raises InputError if the rows cannot be read or encoded.
    """
    loader = RowLoader(Data(train=where), load_tokenizer(str(folder)), ModelLimits.of(config))
    rows = _first(loader.file(where, slice(MAX_ROWS)).examples, MAX_TOKENS)
    return EvalRows(rows, f"{format_rows(len(rows))} of {where}", True)


def _read(recipe: Recipe, base: Path, config: Any, from_end: bool, limits: Limits) -> list[Example]:
    """Return the first held-out rows, or the last training rows if `from_end`.

    Raises InputError if the rows cannot be read or encoded.
    """
    number = limits.rows
    select = slice(-number, None) if from_end else slice(number)
    tokenizer = with_template(load_tokenizer(str(base)), recipe.data)
    loader = RowLoader(recipe.data, tokenizer, ModelLimits.of(config), task_of(recipe).encode)
    loaded = (loader.train if from_end else loader.held_out)(select)
    examples = loaded.examples[-number:] if from_end else loaded.examples[:number]
    return _first(examples, limits.tokens)


def _first(examples: Iterable[Example], max_tokens: int) -> list[Example]:
    """Return the first examples, with at most this number of tokens in total."""
    kept: list[Example] = []
    for example in examples:
        if kept and sum(len(row.ids) for row in kept) + len(example.ids) > max_tokens:
            break
        # The segments of a row do not attend to each other, so each is compared as a row.
        kept += example.split()
    return kept


def _random_rows(config: Any) -> list[Example]:
    """Return rows of random tokens, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    length = min(_RANDOM_TOKENS, num_positions(config) or _RANDOM_TOKENS)
    shape = (_RANDOM_ROWS, length)
    ids = torch.randint(config.vocab_size, shape, generator=generator).tolist()
    return [Example(row, [IGNORE_INDEX, *row[1:]], "random") for row in ids]
