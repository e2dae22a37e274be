"""What several jobs begin with: the base's folder, its config and tokenizer, rows as examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.data.collate import Batch, BatchSize, synthetic_batch
from qlora_cli.data.encode import Example, encode
from qlora_cli.data.formats import detect_format, read_rows
from qlora_cli.data.packing import BatchSchedule, eval_batches
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import DataError, Problem
from qlora_cli.events import Observer
from qlora_cli.files.locate import find_base, read_config
from qlora_cli.files.source import FolderSource
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.family import Family, open_source
from qlora_cli.recipe.resolve import Choice, resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A recipe that has met its base. recipe: without `auto`."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    profile: DeviceProfile
    folder: Path
    config: Any
    tokenizer: Any

    def source(self, model: nn.Module, family: Family) -> FolderSource:
        """The base's tensors."""
        return open_source(self.folder, family)

    def request(self, device: torch.device, observer: Observer) -> ModelRequest:
        """Return the request for the model of this job on `device`."""
        return ModelRequest(self.recipe, self.config, self.source, device, self.profile, observer)


@dataclass(frozen=True)
class TrainingJob:
    """All that is known of a training job before the base is loaded."""

    prepared: Prepared
    run: RunFolder
    schedule: BatchSchedule
    held_out: list[Batch]
    steps: int

    @property
    def largest_step_batches(self) -> list[Batch]:
        """What to plan for: micro-batches that none of the job's exceeds in anything.

        One for the first of each step, and one for all behind it, while which gradients live.
        """
        steps = [self.schedule.sizes(step) for step in range(self.steps)]
        first = [sizes[0] for sizes in steps]
        later = [size for sizes in steps for size in sizes[1:]]
        return [self._of(BatchSize.bound(sizes)) for sizes in (first, later) if sizes]

    @property
    def largest_eval_batches(self) -> list[Batch]:
        """The same of evaluation; empty where nothing is held out."""
        sizes = [batch.size for batch in self.held_out]
        return [self._of(BatchSize.bound(sizes))] if sizes else []

    def _of(self, size: BatchSize) -> Batch:
        return synthetic_batch(size, self.prepared.config.vocab_size)


def prepare(recipe: Recipe, profile: DeviceProfile) -> Prepared:
    """Finds the base and settles what is `auto`. Raises ModelError."""
    resolved, choices = resolve(recipe, profile)
    folder = find_base(recipe.model.name, recipe.model.revision)
    config = read_config(folder / "config.json")
    return Prepared(resolved, choices, profile, folder, config, load_tokenizer(str(folder)))


def read_examples(prepared: Prepared, where: str) -> list[Example]:
    """Rows of one file as token ids and labels. Raises DataError naming file and line."""
    recipe = prepared.recipe
    rows = read_rows(where)
    row_format = detect_format(rows, recipe.data.format)
    vocab_size = prepared.config.vocab_size
    examples = encode(
        rows, row_format, prepared.tokenizer, recipe.data.seq_len, vocab_size=vocab_size
    )
    _check_positions(examples, prepared.config)
    return examples


def read_job(prepared: Prepared) -> TrainingJob:
    """Reads the rows, so that the order of training is known. Raises DataError."""
    recipe = prepared.recipe
    schedule = make_schedule(recipe, read_examples(prepared, recipe.data.train))
    held_out = (
        held_out_batches(recipe, read_examples(prepared, recipe.data.eval))
        if recipe.data.eval
        else []
    )
    steps = recipe.train.steps or math.ceil(recipe.train.epochs * schedule.steps_per_epoch)
    return TrainingJob(prepared, RunFolder(Path(recipe.output)), schedule, held_out, steps)


def make_schedule(recipe: Recipe, examples: Sequence[Example]) -> BatchSchedule:
    """The order of training."""
    return BatchSchedule(
        examples,
        seq_len=recipe.data.seq_len,
        packing=recipe.data.packing,
        micro_batch=recipe.train.micro_batch,
        grad_accum=recipe.train.grad_accum,
        seed=recipe.train.seed,
    )


def held_out_batches(recipe: Recipe, examples: Sequence[Example]) -> list[Batch]:
    """Held-out rows, each once, in order."""
    return list(
        eval_batches(
            examples,
            seq_len=recipe.data.seq_len,
            packing=recipe.data.packing,
            micro_batch=recipe.train.micro_batch,
        )
    )


def _check_positions(examples: Sequence[Example], config: Any) -> None:
    """A learned position table ends; beyond it there is nothing to look up."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return
    beyond = [example for example in examples if len(example.ids) > limit]
    if beyond:
        raise DataError(
            f"{len(beyond)} rows are longer than the base's {limit} positions",
            [Problem(row.origin, f"{len(row.ids)} tokens") for row in beyond[:10]],
            hint=f"shorten them to {limit} tokens or take a base with more positions",
        )
