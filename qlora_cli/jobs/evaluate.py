"""`qlora eval`: loss, perplexity and accuracy on held-out rows, or the metrics of another task."""

from __future__ import annotations

import math
from typing import Any

import torch

from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.packing import eval_batches
from qlora_cli.data.rows import read_rows
from qlora_cli.data.template import with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import NotFinite, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.eval_answers import AnswersFile
from qlora_cli.jobs.label_results import LabelEvalResult
from qlora_cli.jobs.labels import text_columns
from qlora_cli.jobs.open_generator import check_not_an_adapter
from qlora_cli.jobs.pair_reference import with_reference
from qlora_cli.jobs.pair_results import PairEvalResult
from qlora_cli.jobs.results import EvalResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.proof.prove import require_proof_of_model
from qlora_cli.recipe.schema import MAX_SEQ_LEN, Data
from qlora_cli.runs.open import OpenedModel, open_any
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.tasks.classification import CLASSIFICATION, task_of_model
from qlora_cli.tasks.preference import PREFERENCE
from qlora_cli.tasks.registry import task_of
from qlora_cli.tasks.task import EvalScore, Task

_MAX_PERPLEXITY_LOSS = 700.0
"""exp() of a larger loss overflows a Python float."""


def run(
    where: str, *, data: str, observer: Observer, answers: AnswersFile | None = None
) -> EvalResult | PairEvalResult | LabelEvalResult:
    """Evaluate a run or a model on every row of `data`, once.

    where: a run's folder, a model's folder or a hub id. data: a data file or dataset.
    answers: also answer each row's prompt and write the answers next to the references.
    A run's recipe gives the sequence length, packing and row format. For a plain model the format
    is detected and a row may be as long as the model has positions.
    Raises InputError if the model or the rows cannot be used.
    """
    check_not_an_adapter(where)
    device = torch.device(inspect_device().kind)
    require_proof_of_model(where, observer)
    opened = open_any(where, device, observer)
    task = _task(opened)
    settings = _settings(opened, task, data)
    tokenizer = with_template(load_tokenizer(str(opened.folder)), settings)
    limits = ModelLimits.of(opened.loaded.config)
    rows = RowLoader(settings, tokenizer, limits, task.encode).file(data)
    if note := rows.long_rows.text():
        observer.note(note)
    if answers is not None and task.name == CLASSIFICATION.name:
        raise UsageError("a classifier generates no text", where="--generate")
    if answers is not None:
        # Before the loss: a row without a prompt is then found at once.
        answers.write(rows.examples, opened, tokenizer, observer)
    batches = eval_batches(
        rows.examples,
        seq_len=settings.seq_len,
        packing=settings.packing,
        micro_batch=1,
        collate=task.collate,
    )
    if opened.run is not None:
        batches = with_reference(task, opened.run.recipe, opened, batches, device)
    score = task.evaluate(opened.loaded, batches, device)
    if not math.isfinite(score.loss):
        raise NotFinite(
            f"the loss is {score.loss}",
            where=where,
            hint="the weights are finite, so a computation in 16 bit overflows or the adapter is "
            "damaged; evaluate with base.compute_dtype=bfloat16 or float32",
        )
    return _result(task, score)


def _result(task: Task, score: EvalScore) -> EvalResult | PairEvalResult | LabelEvalResult:
    """Return a score as the result of its task."""
    if task.name == CLASSIFICATION.name:
        return LabelEvalResult(score.loss, score.num_targets, dict(score.metrics))
    if task.name == PREFERENCE.name:
        return PairEvalResult(score.loss, score.num_targets, **score.metrics)
    perplexity = math.exp(min(score.loss, _MAX_PERPLEXITY_LOSS))
    return EvalResult(score.loss, perplexity, score.num_targets, score.metrics["accuracy"])


def _task(opened: OpenedModel) -> Task:
    """Return the task of a run, or of a plain model."""
    if opened.run is not None:
        return task_of(opened.run.recipe)
    return task_of_model(read_config(opened.folder / "config.json")) or CAUSAL


def _settings(opened: OpenedModel, task: Task, where: str) -> Data:
    """Return the data section of the run's recipe, or one for a plain model.

    where: the data file.
    """
    if opened.run is not None:
        return opened.run.recipe.data
    content: dict[str, Any] = {"train": "", "packing": False}
    if task.name == CLASSIFICATION.name:
        content |= {"format": task.name, "columns": text_columns(read_rows(where, 1)[0])}
    if ModelLimits.of(opened.loaded.config).positions is not None:
        # The only limit of a plain model is its positions, which `RowLoader` checks.
        content["seq_len"] = MAX_SEQ_LEN
    return Data.model_validate(content)
