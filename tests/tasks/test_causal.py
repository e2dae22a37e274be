"""Causal language modelling: loss, metrics and compared states against a direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qlora_cli.data.collate import collate
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.tasks.backbone import hidden_states
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.train.state import State
from tests.helpers.runs import CPU
from tests.helpers.training import ROWS, make_state


@pytest.fixture
def state(tmp_path: Path) -> State:
    return make_state(tmp_path)


@torch.no_grad()
def direct_logits(state: State) -> tuple[Tensor, Tensor]:
    """Return the logits (m, V) at the positions with a target, and the targets (m,)."""
    batch = collate(ROWS)
    trained = batch.labels != IGNORE_INDEX
    hidden = hidden_states(state.loaded, batch, CPU)[trained]
    return hidden @ state.loaded.head.weight.to(hidden.dtype).t(), batch.labels[trained]


def test_the_loss_is_the_scaled_sum_over_targets(state: State) -> None:
    logits, targets = direct_logits(state)
    loss = CAUSAL.loss(state.loaded, collate(ROWS), CPU, 0.5)
    expected = 0.5 * cross_entropy(logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_metrics_are_means_over_all_batches(state: State) -> None:
    logits, targets = direct_logits(state)
    batches = [collate(ROWS[:2]), collate(ROWS[2:])]
    score = CAUSAL.evaluate(state.loaded, batches, CPU)
    assert score.num_targets == CAUSAL.num_targets(batches) == targets.numel()
    assert score.loss == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-5)
    correct = (logits.argmax(dim=1) == targets).float().mean().item()
    assert score.metrics == {"accuracy": pytest.approx(correct)}


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode(state: State, training: bool) -> None:
    state.loaded.model.train(training)
    CAUSAL.evaluate(state.loaded, [collate(ROWS)], CPU)
    assert state.loaded.model.training is training


def test_compared_states_are_those_that_predict_a_target(state: State) -> None:
    logits, targets = direct_logits(state)
    hidden, compared = CAUSAL.compared_states(state.loaded, CAUSAL.collate(ROWS), CPU)
    assert torch.equal(compared, targets)
    head = state.loaded.head.weight.to(hidden.dtype)
    torch.testing.assert_close(hidden @ head.t(), logits)
