"""The interface of a training task: how rows become batches, a loss and metrics.

The training step, evaluation, the dry run and verification call only this interface. A new task is
one module that implements `Task`, one entry in `tasks/registry.py` and one name in the recipe's
schema (`Recipe.task`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.data.encode import Example, Result
from qlora_cli.data.row_store import Row
from qlora_cli.models.model import LoadedModel
from qlora_cli.recipe.schema import DataFormat


@dataclass(frozen=True)
class EvalScore:
    """The result of an evaluation.

    loss: mean over all targets, in nats. num_targets: number of targets. metrics: the task's
    other metrics by name, for example `accuracy`.
    """

    loss: float
    num_targets: int
    metrics: Mapping[str, float]


class Task(Protocol):
    """One kind of training objective. Implementations hold no state.

    name: the value of `task` in a recipe. trained_head: paths of head modules whose parameters
    train in addition to the adapter; empty if the head stays frozen. Checkpoints contain a trained
    head; an adapter folder and a merged model do not yet, so the first such task must add it there.
    """

    name: str
    trained_head: tuple[str, ...]

    @property
    def model_class(self) -> Any:
        """Return the transformers Auto class that creates the model from its config."""

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

        The loss of the step is divided by this number.
        """

    def loss(self, loaded: LoadedModel, batch: Batch, device: torch.device, scale: float) -> Tensor:
        """Return `scale` times the sum of the loss over the targets of `batch`.

        The result is a float32 scalar on `device` with a gradient. scale: 1 / `num_targets` of the
        step, times the loss scale if float16 training needs one.
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
