"""Preference training: make the chosen answer of a pair more probable than the rejected one.

A row is a pair of two segments, chosen and rejected. A target is a pair. The loss is a function of
the log-probability of each answer (`preference_losses.py`), and it is computed in two passes over
the head, neither of which makes a tensor of tokens x vocabulary: the first gives the
log-probabilities, from which the loss and its derivative by each of them follow; the second is the
cross entropy with these derivatives as the weights of the tokens, whose gradient is therefore
exactly that of the loss.

The reference model needs no weights: it is this model without its adapter. Its log-probabilities
are the constants of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch, collate
from qlora_cli.data.conversation import PAIR
from qlora_cli.data.encode import Example
from qlora_cli.data.encode_pairs import encode_pairs
from qlora_cli.memory.scopes import scope
from qlora_cli.models.attach import adapter_replaced
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.loss import chunked_cross_entropy, score_targets
from qlora_cli.recipe.preference import Preference
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.backbone import head_of, hidden_states, targets_of
from qlora_cli.tasks.preference_losses import PairScores, pair_scores
from qlora_cli.tasks.task import EvalScore, MetricSums, Task, eval_mode


@dataclass(frozen=True)
class PreferenceTask(Task):
    """The task `preference`. A target is a pair.

    settings: the recipe's section, without `auto`. trains_base: whether the base is trained, so
    that it is the reference model only before the first step.
    """

    settings: Preference
    trains_base: bool = False

    name = "preference"
    target_name = "pairs"
    segment_names = PAIR
    encode = staticmethod(encode_pairs)

    def configured(self, recipe: Recipe) -> PreferenceTask:
        """Return the task with the section `preference` of a resolved recipe."""
        return PreferenceTask(recipe.preference, recipe.adapter.method == "full")

    @property
    def needs_constants(self) -> bool:
        """Whether the loss needs the log-probabilities under the reference model."""
        return self.settings.needs_reference

    @property
    def constants_need_start(self) -> bool:
        """Whether the reference model exists only before the first step."""
        return self.trains_base or self.settings.reference == "start"

    @property
    def model_class(self) -> Any:
        """Return transformers.AutoModelForCausalLM."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Concatenate both answers of all pairs into one sequence without padding."""
        return collate(examples)

    def num_targets(self, batches: Sequence[Batch]) -> int:
        """Return the number of pairs in all `batches`."""
        return sum(len(batch.segments) // 2 for batch in batches)

    @torch.no_grad()
    def constants(self, loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
        """Return the log-probabilities (P, 2) of the answers under the reference model."""
        is_base = self.settings.reference == "base"
        with eval_mode(loaded), adapter_replaced(loaded, {}) if is_base else nullcontext():
            hidden = hidden_states(loaded, batch, device)
            return _answer_log_probs(loaded, hidden, batch, device)

    def loss(
        self,
        loaded: LoadedModel,
        batch: Batch,
        device: torch.device,
        scale: float,
        metrics: MetricSums | None = None,
    ) -> Tensor:
        """Return `scale` times the sum of the pairs' losses, a float32 scalar."""
        hidden = hidden_states(loaded, batch, device)
        log_probs = _answer_log_probs(loaded, hidden, batch, device).requires_grad_()
        with scope("loss"):
            scores = self._scores(log_probs, batch, device)
            total = scores.loss.sum() * scale
            (slopes,) = torch.autograd.grad(total, log_probs)
            weights = -slopes.flatten()[_answer_of_target(batch).to(device, non_blocking=True)]
        if metrics is not None:
            metrics.add(scores.metric_sums())
        positions, targets = targets_of(batch, device)
        weight, bias, transform = head_of(loaded)
        weighted = chunked_cross_entropy(
            hidden, weight, positions, targets, weights, bias, transform, loaded.loss_chunk
        )
        # The value of the loss with the gradient of the weighted cross entropy.
        return total.detach() + (weighted - weighted.detach())

    @torch.no_grad()
    def evaluate(
        self, loaded: LoadedModel, batches: Iterable[Batch], device: torch.device
    ) -> EvalScore:
        """Return the mean loss of the pairs and the means of accuracy, margin and both rewards."""
        sums: dict[str, float] = {}
        num_pairs = 0
        with eval_mode(loaded):
            for batch in batches:
                for name, value in self._evaluated(loaded, batch, device).items():
                    sums[name] = sums.get(name, 0.0) + value
                num_pairs += self.num_targets([batch])
        means = {name: value / max(num_pairs, 1) for name, value in sums.items()}
        return EvalScore(means.pop("loss", 0.0), num_pairs, means)

    @torch.no_grad()
    def compared_states(
        self, loaded: LoadedModel, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states (n, d) that predict an answer's token, and these tokens (n,)."""
        hidden = hidden_states(loaded, batch, device)
        positions, targets = targets_of(batch, device)
        return hidden[positions], targets

    def _evaluated(
        self, loaded: LoadedModel, batch: Batch, device: torch.device
    ) -> dict[str, float]:
        """Return the sums of loss and metrics over the pairs of a batch; zeros on `meta`."""
        hidden = hidden_states(loaded, batch, device)
        log_probs = _answer_log_probs(loaded, hidden, batch, device)
        with scope("loss"):
            scores = self._scores(log_probs, batch, device)
            sums = {"loss": scores.loss.sum(), **scores.metric_sums()}
            values = torch.stack(list(sums.values()))
        read = [0.0] * len(sums) if values.is_meta else values.tolist()
        return dict(zip(sums, read, strict=True))

    def _scores(self, log_probs: Tensor, batch: Batch, device: torch.device) -> PairScores:
        """Return the scores of the pairs. log_probs: (P, 2), of the trained model."""
        lengths = torch.tensor(_answer_lengths(batch), dtype=torch.float32).view(-1, 2)
        reference = None
        if self.needs_constants:
            assert batch.constants is not None, "the rows have no reference log-probabilities"
            reference = batch.constants.to(device, non_blocking=True)
        lengths = lengths.to(device, non_blocking=True)
        return pair_scores(self.settings, log_probs, lengths, reference)


PREFERENCE = PreferenceTask(Preference(beta=0.1))


def _answer_log_probs(
    loaded: LoadedModel, hidden: Tensor, batch: Batch, device: torch.device
) -> Tensor:
    """Return the log-probability of each answer (P, 2) float32, without a gradient."""
    weight, bias, transform = head_of(loaded)
    positions, targets = targets_of(batch, device)
    tokens, _ = score_targets(
        hidden.detach(), weight, positions, targets, bias, transform, loaded.loss_chunk
    )
    with scope("loss"):
        # Not index_add, whose order of additions on a GPU differs from run to run.
        sums = [part.sum() for part in tokens.split(_answer_lengths(batch))]
        return torch.stack(sums).view(-1, 2)


def _answer_lengths(batch: Batch) -> list[int]:
    """Return the number of trained tokens of each segment, in order."""
    parts = (batch.labels != IGNORE_INDEX).split(list(batch.segments))
    return [int(part.sum()) for part in parts]


def _answer_of_target(batch: Batch) -> Tensor:
    """Return the index of the segment of each target, (m,) int64 on the CPU."""
    lengths = torch.tensor(_answer_lengths(batch))
    return torch.arange(len(lengths)).repeat_interleave(lengths)
