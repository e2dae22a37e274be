"""Sequence classification: predict the label of each text, or a number.

A row is a text or a pair of texts, and a target is a row. The model is transformers' class for
sequence classification: its head is new or from the base, and trains in float32 next to the
adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qlora_cli.data.collate import Batch, collate
from qlora_cli.data.encode import Example
from qlora_cli.data.encode_labels import LabelEncoder
from qlora_cli.memory.scopes import scope
from qlora_cli.models.classifier import (
    ClassifierClass,
    classifier_logits,
    head_inputs,
    pooled_states,
)
from qlora_cli.models.model import LoadedModel
from qlora_cli.recipe.classification import Classification
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.backbone import hidden_states
from qlora_cli.tasks.classification_metrics import class_metrics, regression_metrics
from qlora_cli.tasks.task import EvalScore, MetricSums, Task, eval_mode


@dataclass(frozen=True)
class ClassificationTask(Task):
    """The task `classification`. A target is a row.

    settings: the recipe's section, without `auto`.
    """

    settings: Classification

    name = "classification"
    target_name = "rows"

    def configured(self, recipe: Recipe) -> ClassificationTask:
        """Return the task with the section `classification` of a resolved recipe."""
        return ClassificationTask(recipe.classification)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the metrics of classes or of a regression."""
        return self.settings.metrics

    @property
    def model_class(self) -> Any:
        """Return transformers' AutoModelForSequenceClassification with the recipe's labels."""
        return ClassifierClass(self.settings.names)

    def config_entries(self, model: Any) -> dict[str, Any]:
        """Return the labels and the class of the model."""
        return {
            "architectures": [type(model).__name__],
            **ClassifierClass(self.settings.names).config_entries(),
        }

    @property
    def encode(self) -> Any:
        """Return the function that encodes rows with these labels."""
        pairs = self.settings.pairs
        return LabelEncoder(self.settings.names, None if pairs == "auto" else pairs)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Concatenate the examples into one sequence without padding."""
        batch = collate(examples)
        types = [
            int(0 < row.second <= position) for row in examples for position in range(len(row.ids))
        ]
        values = [0.0 if row.value is None else row.value for row in examples]
        return replace(batch, values=torch.tensor(values), token_types=torch.tensor([types]))

    def num_targets(self, batches: Sequence[Batch]) -> int:
        """Return the number of rows in all `batches`."""
        return sum(len(batch.segments) for batch in batches)

    def planned(self, batch: Batch) -> Batch:
        """Return the batch with the first label at each row."""
        types = torch.zeros_like(batch.input_ids)
        return replace(batch, values=torch.zeros(len(batch.segments)), token_types=types)

    def loss(
        self,
        loaded: LoadedModel,
        batch: Batch,
        device: torch.device,
        scale: float,
        metrics: MetricSums | None = None,
    ) -> Tensor:
        """Return `scale` times the sum of the rows' losses, a float32 scalar."""
        logits = self.logits(loaded, batch, device)
        with scope("loss"):
            values = _values(batch, device)
            if metrics is not None and not self.settings.is_regression:
                hits = logits.detach().argmax(dim=1) == values.long()
                metrics.add({"accuracy": hits.float().sum()})
            return self.row_losses(logits, values).sum() * scale

    def row_losses(self, logits: Tensor, values: Tensor) -> Tensor:
        """Return the loss of each row, (rows,).

        logits: (rows, labels) float32. values: (rows,) float32. The cross entropy of a class times
        the weight of the class, or the squared error of a number.
        """
        if self.settings.is_regression:
            return (logits.squeeze(1) - values).square()
        weights = self.settings.class_weights
        factors = None
        if isinstance(weights, dict):
            ordered = [weights[name] for name in self.settings.names]
            factors = torch.tensor(ordered).to(logits.device, non_blocking=True)
        return cross_entropy(logits, values.long(), weight=factors, reduction="none")

    def logits(self, loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
        """Return the logits (rows, labels) float32 of the rows of a batch."""
        inputs = self._head_inputs(loaded, batch, device)
        with scope("loss"):
            return classifier_logits(loaded, inputs)

    @torch.no_grad()
    def evaluate(
        self, loaded: LoadedModel, batches: Iterable[Batch], device: torch.device
    ) -> EvalScore:
        """Return the mean loss of the rows and the metrics of `classification_metrics.py`."""
        logits, values = [], []
        with eval_mode(loaded):
            for batch in batches:
                found = self.logits(loaded, batch, device)
                losses = self.row_losses(found, _values(batch, device))
                values.append(_values(batch, torch.device("cpu")))
                if device.type != "meta":
                    logits.append(torch.cat([losses[:, None], found], dim=1).cpu())
        number = sum(map(len, values))
        if not logits:
            return EvalScore(0.0, number, dict.fromkeys(self.settings.metrics, 0.0))
        found = torch.cat(logits)
        losses, predicted, labels = found[:, 0], found[:, 1:], torch.cat(values)
        compute = regression_metrics if self.settings.is_regression else class_metrics
        return EvalScore(losses.mean().item(), number, compute(predicted, labels))

    @torch.no_grad()
    def compared_states(
        self, loaded: LoadedModel, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs (rows, k) of the last linear of the head, and the classes (rows,)."""
        values = _values(batch, device)
        classes = torch.zeros_like(values) if self.settings.is_regression else values
        return self._head_inputs(loaded, batch, device), classes.long()

    def _head_inputs(self, loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
        hidden = hidden_states(loaded, batch, device)
        with scope("loss"):
            return head_inputs(loaded, pooled_states(loaded.family, hidden, batch.segments))


CLASSIFICATION = ClassificationTask(Classification(kind="classes"))


def task_of_model(config: Any) -> ClassificationTask | None:
    """Return the task of a trained classifier by its transformers config; None for another model.

    config: the content of config.json, with its architectures and labels.
    """
    names = getattr(config, "architectures", None) or ()
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        return None
    if config.problem_type == "regression" or config.num_labels == 1:
        return ClassificationTask(Classification(kind="regression"))
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    return ClassificationTask(Classification(kind="classes", labels=labels))


def _values(batch: Batch, device: torch.device) -> Tensor:
    assert batch.values is not None, "the rows have no labels"
    return batch.values.to(device, non_blocking=True)
