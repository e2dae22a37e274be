"""The common start of several jobs: resolve the recipe, find the base, read the rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.data.collate import Batch, BatchSize, synthetic_batch
from qlora_cli.data.encode import Example
from qlora_cli.data.load import LoadedData, ModelLimits, RowLoader
from qlora_cli.data.packing import BatchSchedule, eval_batches
from qlora_cli.data.positions import check_seq_len
from qlora_cli.data.template import with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.device import DeviceProfile
from qlora_cli.events import Observer, Silent
from qlora_cli.files.locate import find_base, read_config
from qlora_cli.files.packed_store import PackedStore
from qlora_cli.files.source import TensorSource
from qlora_cli.jobs.data_findings import dataset_of, report_findings
from qlora_cli.jobs.labels import resolve_labels
from qlora_cli.jobs.padding import padding_of_job
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.checkpoint_source import open_source, with_new_head
from qlora_cli.models.family import Family
from qlora_cli.models.packed_base import has_packed_copy, packed_store
from qlora_cli.parallel.processes import SINGLE, Processes
from qlora_cli.proof.prove import ModelProof
from qlora_cli.recipe.resolve import Choice, resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.tasks.registry import task_of
from qlora_cli.train.schedule import steps_between

_SILENT = Silent()


@dataclass(frozen=True)
class Prepared:
    """A recipe together with the base that it names.

    recipe: without `auto` values. choices: the automatic choices and their reasons.
    profile: of the device that the job runs on. folder: the base's. config: transformers' config.
    tokenizer: the base's; None if it has none. proof: of a model type whose family is derived.
    """

    recipe: Recipe
    choices: tuple[Choice, ...]
    profile: DeviceProfile
    folder: Path
    config: Any
    tokenizer: Any
    proof: ModelProof | None = None

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that `data.template` sets; None if the base's own template is used."""
        if self.recipe.data.template is None:
            return None
        text: str = self.tokenizer.chat_template
        return text

    def source(self, model: nn.Module, family: Family) -> TensorSource:
        """Return the tensors in the base's folder, and those of a new classification head."""
        source = open_source(self.folder, family)
        return with_new_head(source, family, self.config, self.recipe.train.seed)

    def request(
        self,
        device: torch.device,
        observer: Observer,
        processes: Processes = SINGLE,
        adapter: AdapterFile | None = None,
    ) -> ModelRequest:
        """Return the request for the model of this job on `device`.

        processes: those that train the job. adapter: as of `ModelRequest`.
        """
        recipe, copy = self.recipe, self.packed_store(observer)
        given = (recipe, self.config, self.source, device, self.profile, observer)
        return ModelRequest(*given, copy=copy, processes=processes, adapter=adapter)

    def packed_store(self, observer: Observer) -> PackedStore | None:
        """Return the packed copy of the base; None if `base.cache` keeps none."""
        model_class, kind = task_of(self.recipe).model_class, self.profile.kind
        return packed_store(self.recipe, self.folder, self.config, model_class, kind, observer)

    def has_packed_copy(self, recipe: Recipe) -> bool:
        """Return whether a job on this base, with another recipe, loads it without packing."""
        model_class, kind = task_of(recipe).model_class, self.profile.kind
        return has_packed_copy(recipe, self.folder, self.config, model_class, kind)


@dataclass(frozen=True)
class TrainingJob:
    """Everything that is known about a training job before the base is loaded.

    run: the run's folder. schedule: the order of training. held_out: batches of the evaluation
    set, on the CPU; empty if there is none. steps: number of optimizer steps of the job.
    data_digest: SHA-256 over the tokens and labels of the training rows, and of the held-out rows.
    """

    prepared: Prepared
    run: RunFolder
    schedule: BatchSchedule
    held_out: list[Batch]
    steps: int
    data_digest: str

    @property
    def eval_every(self) -> int | None:
        """Return the optimizer steps between two evaluations; None for none during training."""
        every = self.prepared.recipe.train.eval_every
        return steps_between(every, self.schedule.steps_per_epoch)

    @property
    def largest_step_batches(self) -> list[Batch]:
        """Return the micro-batches of a step to plan for: at least as large as any of the job's.

        There are one or two. The first is for the first micro-batch of every process in a step, the
        second is for all later ones, during which gradients exist already.
        """
        return self.largest_divided_batches(1)

    def largest_divided_batches(self, parts: int) -> list[Batch]:
        """Return `largest_step_batches` if each micro-batch is divided into `parts`."""
        distinct = range(min(self.steps, self.schedule.distinct_steps))
        steps = [self.schedule.sizes(step, parts) for step in distinct]
        processes = self.prepared.profile.count
        first = [size for sizes in steps for size in sizes[:processes]]
        later = [size for sizes in steps for size in sizes[processes:]]
        return [self._batch(BatchSize.upper_bound(sizes)) for sizes in (first, later) if sizes]

    @property
    def largest_eval_batches(self) -> list[Batch]:
        """Return one batch at least as large as any of `held_out`; empty if there are none."""
        sizes = [batch.size for batch in self.held_out]
        return [self._batch(BatchSize.upper_bound(sizes))] if sizes else []

    def _batch(self, size: BatchSize) -> Batch:
        return synthetic_batch(size, self.prepared.config.vocab_size)


def prepare(recipe: Recipe, profile: DeviceProfile) -> Prepared:
    """Return the recipe without `auto` values, with its base's folder, config and tokenizer.

    profile: of the device that the job runs on. Raises ModelError if the base is not found or
    cannot be used.
    """
    resolved, choices = resolve(recipe, profile)
    folder = find_base(recipe.model.name, recipe.model.revision)
    config = read_config(folder / "config.json")
    resolved, chosen_labels = resolve_labels(resolved, config)
    choices += chosen_labels
    tokenizer = with_template(load_tokenizer(str(folder)), recipe.data)
    return Prepared(resolved, choices, profile, folder, config, tokenizer)


def read_rows(prepared: Prepared, observer: Observer = _SILENT) -> LoadedData:
    """Return the training rows and the held-out rows of the recipe as examples.

    Raises InputError if a file cannot be read, DataError listing the rows that cannot be used.
    """
    recipe, limits = prepared.recipe, ModelLimits.of(prepared.config)
    loader = RowLoader(recipe.data, prepared.tokenizer, limits, task_of(recipe).encode)
    return loader.load(observer)


def read_job(
    prepared: Prepared, observer: Observer = _SILENT, allow: Collection[str] | None = None
) -> TrainingJob:
    """Read the recipe's rows and return the job with its schedule and number of steps.

    observer: receives a note for each choice or loss of rows. allow: codes of findings that are
    neither reported nor stop the job; None runs no checks.
    Raises InputError if a file cannot be read, DataError listing the rows that cannot be used or
    the findings that stop the job, RecipeError if the sequences are longer than the base's
    positions.
    """
    recipe = prepared.recipe
    check_seq_len(recipe.data, prepared.config, recipe.adapter.prefix)
    rows = read_rows(prepared, observer)
    for note in rows.notes:
        observer.note(note)
    if allow is not None:
        dataset = dataset_of(recipe.data, rows, prepared.tokenizer, prepared.folder)
        report_findings(dataset, allow, observer)
    schedule = make_schedule(recipe, rows.train.examples)
    if padding := padding_of_job(recipe, prepared.config, schedule):
        observer.note(padding)
    held_out = held_out_batches(recipe, rows.held_out.examples) if rows.held_out else []
    steps = recipe.train.steps or math.ceil(recipe.train.epochs * schedule.steps_per_epoch)
    parts = [rows.train.examples, *([rows.held_out.examples] if rows.held_out else [])]
    digest = " ".join(part.digest() for part in parts)
    return TrainingJob(prepared, RunFolder(Path(recipe.output)), schedule, held_out, steps, digest)


def make_schedule(recipe: Recipe, examples: Sequence[Example]) -> BatchSchedule:
    """Return the order in which the examples are trained, by the recipe's settings."""
    return BatchSchedule(
        examples,
        seq_len=recipe.data.seq_len,
        packing=recipe.data.packing,
        micro_batch=recipe.train.pass_size,
        grad_accum=recipe.train.grad_accum,
        seed=recipe.train.seed,
        collate=task_of(recipe).collate,
    )


def held_out_batches(recipe: Recipe, examples: Sequence[Example]) -> list[Batch]:
    """Return the batches of the evaluation set: each example once, in order, on the CPU."""
    return list(
        eval_batches(
            examples,
            seq_len=recipe.data.seq_len,
            packing=recipe.data.packing,
            micro_batch=recipe.train.pass_size,
            collate=task_of(recipe).collate,
        )
    )
