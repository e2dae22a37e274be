"""Open a recipe's rows; count them and their tokens, from a sample if there are many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.data.example_sizes import sizes
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.mixture import read_data
from qlora_cli.data.positions import check_seq_len
from qlora_cli.data.template import with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.files.locate import find_base, find_tokenizer, read_config
from qlora_cli.recipe.schema import DataFormat, Recipe
from qlora_cli.tasks.registry import task_of

SAMPLE = 2000
"""Number of rows that are encoded at most."""


@dataclass(frozen=True)
class Survey:
    """The lengths of training rows.

    rows: number of all training rows in the files. encoded: number of rows that were encoded; if it
    is smaller, these are a random sample. lengths, targets: number of tokens and of trained tokens
    of each encoded row that can be used. A split row is several of them. format: of the rows.
    """

    rows: int
    encoded: int
    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    format: DataFormat

    @property
    def is_sample(self) -> bool:
        """Return whether some rows were not encoded."""
        return self.encoded < self.rows

    def of_all(self, number: int) -> int:
        """Return a number of all rows, by proportion, for a number of the encoded rows."""
        return round(number * self.rows / self.encoded)


def survey(recipe: Recipe, tokenizer: Any, limits: ModelLimits) -> Survey:
    """Return the lengths of the training rows, after `data.long_rows`.

    At most `SAMPLE` rows are encoded, chosen by `data.seed`. Other arguments and errors as of
    `RowLoader`.
    """
    data = recipe.data
    rows = len(read_data(data).train)
    if rows > SAMPLE:
        data = data.model_copy(update={"max_rows": SAMPLE})
    loaded = RowLoader(data, tokenizer, limits, task_of(recipe).encode).train()
    lengths, targets = sizes(loaded.examples)
    return Survey(
        rows=rows,
        encoded=min(rows, SAMPLE),
        lengths=tuple(lengths.tolist()),
        targets=tuple(targets.tolist()),
        format=loaded.format,
    )


def row_loader(recipe: Recipe) -> RowLoader:
    """Return the loader of the recipe's rows, with the base's tokenizer and limits.

    The weights are not needed. Raises ModelError if the base is not found, RecipeError if
    `data.seq_len` is larger than its number of positions.
    """
    folder = find_tokenizer(recipe.model.name, recipe.model.revision)
    tokenizer = with_template(load_tokenizer(str(folder)), recipe.data)
    if tokenizer is None:
        find_base(recipe.model.name, recipe.model.revision)  # Refuses a folder without a config.
    return RowLoader(recipe.data, tokenizer, _model_limits(recipe, folder), task_of(recipe).encode)


def _model_limits(recipe: Recipe, folder: Path) -> ModelLimits:
    """Return the limits of the base in `folder`. A folder that has only a tokenizer has none.

    Raises RecipeError if `data.seq_len` is larger than the base's number of positions.
    """
    file = folder / "config.json"
    if not file.is_file():
        return ModelLimits()
    config = read_config(file)
    check_seq_len(recipe.data, config, recipe.adapter.prefix)
    return ModelLimits.of(config)
