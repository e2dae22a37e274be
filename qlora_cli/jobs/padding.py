"""The padding of `task: classification` for models whose attention cannot separate rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from qlora_cli.data.packing import BatchSchedule
from qlora_cli.errors import InputError
from qlora_cli.jobs.data_survey import row_loader, survey
from qlora_cli.models.build import skeleton
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.classification import CLASSIFICATION
from qlora_cli.tasks.registry import task_of
from qlora_cli.units import format_count


def is_padded(recipe: Recipe, config: Any) -> bool:
    """Return whether the rows of a micro-batch are padded to the longest of them.

    config: transformers' config of the base.
    """
    if recipe.task != CLASSIFICATION.name:
        return False
    return not skeleton(config, torch.float32, task_of(recipe).model_class)[1].rows.packs


def padding_of_job(recipe: Recipe, config: Any, schedule: BatchSchedule) -> str | None:
    """Return the number and the share of padding tokens in the first epoch; None without any."""
    if not is_padded(recipe, config):
        return None
    sizes = [size for step in range(schedule.steps_per_epoch) for size in schedule.sizes(step)]
    tokens = sum(size.tokens for size in sizes)
    return _text(tokens, sum(size.segments * size.longest for size in sizes), "")


def planned_padding(recipe: Recipe, config: Any) -> str | None:
    """Return the same for a recipe that is planned, from a sample of the rows if they are many.

    None as well if the rows or the tokenizer cannot be read.
    """
    if not is_padded(recipe, config):
        return None
    try:
        loader = row_loader(recipe)
        found = survey(recipe, loader.tokenizer, loader.limits)
    except InputError:
        return None
    lengths = list(found.lengths)
    random.Random(recipe.train.seed).shuffle(lengths)
    size = recipe.train.pass_size
    batches: list[Sequence[int]] = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return _text(found.of_all(sum(lengths)), found.of_all(padded), "about ")


def _text(tokens: int, padded: int, about: str) -> str | None:
    if padded == tokens:
        return None
    return (
        f"padding: {about}{format_count(padded - tokens)} of {format_count(padded)} computed "
        f"tokens of an epoch ({(padded - tokens) / padded:.1%})"
    )
