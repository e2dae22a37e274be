"""Causal language modelling: predict the next token at every trained position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch, collate
from qlora_cli.data.encode import Example, encode
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.loss import chunked_cross_entropy, score
from qlora_cli.tasks.backbone import head_of, hidden_states, targets_of
from qlora_cli.tasks.task import EvalScore, MetricSums, Task, eval_mode


class CausalTask(Task):
    """The task `causal`. A target is a token that is predicted and trained on."""

    name = "causal"
    # Not a method: the processes that tokenize would have to import the models.
    encode = staticmethod(encode)

    @property
    def model_class(self) -> Any:
        """Return transformers.AutoModelForCausalLM."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Concatenate the examples into one sequence without padding."""
        return collate(examples)

    def num_targets(self, batches: Sequence[Batch]) -> int:
        """Return the number of trained tokens in all `batches`.

        Dividing by this number gives each token the same weight in every batch of a step, also in
        the last step of an epoch, which may have fewer batches.
        """
        return sum(batch.num_targets for batch in batches)

    def loss(
        self,
        loaded: LoadedModel,
        batch: Batch,
        device: torch.device,
        scale: float,
        metrics: MetricSums | None = None,
    ) -> Tensor:
        """Return `scale` times the cross entropy summed over trained tokens, a float32 scalar."""
        hidden = hidden_states(loaded, batch, device)
        positions, targets = targets_of(batch, device)
        weight, bias, transform = head_of(loaded)
        return chunked_cross_entropy(
            hidden, weight, positions, targets, scale, bias, transform, loaded.loss_chunk
        )

    @torch.no_grad()
    def evaluate(
        self, loaded: LoadedModel, batches: Iterable[Batch], device: torch.device
    ) -> EvalScore:
        """Return the mean loss and `accuracy`, the share of trained tokens predicted top-1."""
        total, num_correct, num_targets = 0.0, 0, 0
        with eval_mode(loaded):
            for batch in batches:
                losses, correct = _score(loaded, batch, device)
                if device.type != "meta":
                    total, num_correct = total + losses.item(), num_correct + int(correct.item())
                num_targets += batch.num_targets
        divisor = max(num_targets, 1)
        return EvalScore(total / divisor, num_targets, {"accuracy": num_correct / divisor})

    @torch.no_grad()
    def compared_states(
        self, loaded: LoadedModel, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states (n, d) that predict a trained token, and these tokens (n,)."""
        hidden = hidden_states(loaded, batch, device)
        positions, targets = targets_of(batch, device)
        return hidden[positions], targets


CAUSAL = CausalTask()


def _score(loaded: LoadedModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (summed cross entropy, number of top-1 hits) of one batch.

    A function of its own, so that its hidden states are freed before the next batch is computed.
    """
    hidden = hidden_states(loaded, batch, device)
    weight, bias, transform = head_of(loaded)
    targets = targets_of(batch, device)
    return score(hidden, weight, *targets, bias, transform, loaded.loss_chunk)
