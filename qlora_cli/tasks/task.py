"""The interface of a training task: how rows become batches, a loss and metrics.

The training step, evaluation, the dry run and verification call only this interface. A new task is
one module that implements `Task`, one entry in `tasks/registry.py` and one name in the recipe's
schema (`Recipe.task`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.data.encode import Example, Result
from qlora_cli.data.row_store import Row
from qlora_cli.models.model import LoadedModel
from qlora_cli.recipe.schema import DataFormat, Recipe


@dataclass(frozen=True)
class EvalScore:
    """The result of an evaluation.

    loss: mean over all targets, in nats. num_targets: number of targets. metrics: the task's
    other metrics by name, for example `accuracy`.
    """

    loss: float
    num_targets: int
    metrics: Mapping[str, float]


class MetricSums:
    """The sums of a task's metrics over the targets of an optimizer step, on the device.

    sums: name -> scalar.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the sums of one micro-batch. metrics: name -> scalar."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


class Task(Protocol):
    """One kind of training objective. Implementations hold no state except the recipe's settings.

    A class inherits it and overrides what differs from a task without settings.

    name: the value of `task` in a recipe. target_name: what is counted as a target, in the plural.
    segment_names: names of the segments of a row, such as the two answers of a pair; empty if a row
    is one segment. A model class with a head that trains in addition to the adapter has it in its
    family (`Family.classifier`).
    """

    name: str
    target_name: str = "tokens"
    segment_names: tuple[str, ...] = ()

    def configured(self, recipe: Recipe) -> Task:
        """Return the task with the settings of a resolved recipe that names it."""
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of the metrics that are shown next to the held-out loss."""
        return ()

    @property
    def needs_constants(self) -> bool:
        """Whether `constants` is called for every row before training."""
        return False

    @property
    def constants_need_start(self) -> bool:
        """Whether `constants` depends on weights that training changes."""
        return False

    @property
    def model_class(self) -> Any:
        """Return the transformers Auto class that creates the model from its config."""

    def config_entries(self, model: Any) -> dict[str, Any]:
        """Return the entries of config.json in which a trained model differs from its base.

        model: transformers' model.
        """
        return {}

    def encode(
        self,
        rows: Sequence[Row],
        format: DataFormat,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        only_check: bool = False,
    ) -> list[Result]:
        """Return one result per row, in order: an example of any length, or the row's error.

        It is called for a part of the rows at a time, also in other processes.
        vocab_size: token ids must be smaller than it. only_check: check the fields and tokenize
        nothing. Raises ModelError if the tokenizer cannot encode this format.
        """

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return one micro-batch that holds `examples` in order, on the CPU."""

    def num_targets(self, batches: Sequence[Batch]) -> int:
        """Return the number of targets in all micro-batches of an optimizer step.

        The loss of the step and its metrics are divided by this number.
        """

    def constants(self, loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
        """Return the constants (rows, k) float32 of the rows of a batch, on `device`.

        They are computed with the model before the first step and given to the rows of every batch
        from then on. Called only if `needs_constants`.
        """
        raise AssertionError(f"the task {self.name} computes no constants")

    def planned(self, batch: Batch) -> Batch:
        """Return a batch that is not from any text with what the task adds to the rows of one."""
        if not self.needs_constants:
            return batch
        width = len(self.segment_names)
        return replace(batch, constants=torch.zeros(len(batch.segments) // width, width))

    def loss(
        self,
        loaded: LoadedModel,
        batch: Batch,
        device: torch.device,
        scale: float,
        metrics: MetricSums | None = None,
    ) -> Tensor:
        """Return `scale` times the sum of the loss over the targets of `batch`.

        The result is a float32 scalar on `device` with a gradient. scale: 1 / `num_targets` of the
        step, times the loss scale if float16 training needs one. metrics: receives the sums of the
        task's other metrics, if it has any in training.
        """

    def evaluate(
        self, loaded: LoadedModel, batches: Iterable[Batch], device: torch.device
    ) -> EvalScore:
        """Return loss and metrics over all `batches`. The model's train/eval mode is restored.

        On `meta` (dry run) no value is read: loss and metrics are 0.
        """

    def compared_states(
        self, loaded: LoadedModel, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return what verification compares between two models.

        The first tensor (n, d) holds the head's inputs at the n compared positions; the second
        (n,) int64 holds the targets at these positions. Both are on `device`.
        """


@contextmanager
def eval_mode(loaded: LoadedModel) -> Iterator[None]:
    """Put the model in eval mode inside the block and restore its mode afterwards."""
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        yield
    finally:
        loaded.model.train(was_training)
