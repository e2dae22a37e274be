"""One optimizer step of preference training: accumulation, activation checkpointing, metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_cli.data.collate import Batch, collate
from qlora_cli.train import step as stepping
from qlora_cli.train.state import State
from qlora_cli.train.step import StepOutcome, train_step
from tests.helpers.pairs import PAIRS, make_pair_state, with_reference
from tests.helpers.training import FLOAT16


def outcome_and_gradients(
    state: State, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> tuple[StepOutcome, dict[str, Tensor]]:
    """Return the outcome and the unscaled gradients of a step that updates no parameter."""
    gradients: dict[str, Tensor] = {}

    def record_gradients(state: State, norm: float, lr: float) -> None:
        for name, parameter in state.trainable.items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad.float() / state.loss_scale.value

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "_update", record_gradients)
        outcome = train_step(state, batches, 1e-3)
    return outcome, gradients


def assert_same(
    found: tuple[StepOutcome, dict[str, Tensor]],
    wanted: tuple[StepOutcome, dict[str, Tensor]],
    tolerance: float = 1e-5,
) -> None:
    assert found[0].loss == pytest.approx(wanted[0].loss, rel=tolerance)
    assert found[0].metrics == pytest.approx(dict(wanted[0].metrics), abs=10 * tolerance)
    largest = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).abs().max()) < tolerance * largest, name


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo"])
def test_accumulated_pairs_give_the_gradient_of_one_batch(
    tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The divisor is the number of pairs of the step; a micro-batch may have any number of them."""
    state = make_pair_state(tmp_path, preference={"loss": loss})
    pairs = with_reference(state, PAIRS)
    whole = outcome_and_gradients(state, [collate(pairs)], monkeypatch)
    parts = [collate(pairs[:2]), collate(pairs[2:])]
    assert_same(outcome_and_gradients(state, parts, monkeypatch), whole)
    assert sorted(whole[0].metrics) == ["accuracy", "margin", "reward_chosen", "reward_rejected"]


def test_activation_checkpointing_does_not_change_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for checkpointing in (True, False):
        train = {"activation_checkpointing": checkpointing}
        state = make_pair_state(tmp_path, train=train)
        pairs = with_reference(state, PAIRS)
        results.append(outcome_and_gradients(state, [collate(pairs)], monkeypatch))
    assert_same(*results, tolerance=1e-6)


def test_float16_gradients_are_the_float32_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss scale is in the weights of the tokens before gradients are rounded to 16 bit."""
    results = []
    for sections in ({}, FLOAT16):
        state = make_pair_state(tmp_path, **sections)
        state.loss_scale.value = 2.0**8 if state.loss_scale.needed else 1.0
        batch = collate(with_reference(state, PAIRS))
        results.append(outcome_and_gradients(state, [batch], monkeypatch))
    (exact, wanted), (half, found) = results
    assert half.loss == pytest.approx(exact.loss, rel=1e-2)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 0.05, name


def test_steps_raise_the_margin(tmp_path: Path) -> None:
    state = make_pair_state(tmp_path)
    batches = [collate(with_reference(state, PAIRS))]
    outcomes = [train_step(state, batches, 1e-2) for _ in range(6)]
    assert outcomes[-1].loss < outcomes[0].loss
    assert outcomes[-1].metrics["margin"] > outcomes[0].metrics["margin"]
    assert outcomes[-1].metrics["accuracy"] == 1.0
    assert torch.isfinite(torch.tensor(outcomes[-1].grad_norm))
