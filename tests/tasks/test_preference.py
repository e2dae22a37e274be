"""The preference task: losses and gradients equal the published formulas on complete logits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.data.collate import collate
from qlora_cli.data.encode import Example
from qlora_cli.nn import loss as loss_module
from qlora_cli.tasks.task import MetricSums
from qlora_cli.train.state import State
from tests.helpers.families import MODEL_TYPES
from tests.helpers.pairs import PAIRS, make_pair_state, with_reference, zero_b
from tests.helpers.preference_reference import answer_log_prob, published_loss
from tests.helpers.runs import CPU

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.3},
    "smoothed": {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.4},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 0.7},
    "orpo": {"loss": "orpo", "beta": 0.5},
}


def gradients_of(state: State, loss: Tensor) -> dict[str, Tensor]:
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in state.trainable.items() if p.grad is not None}
    state.optimizer.zero_grad(set_to_none=True)
    return found


def loss_of(state: State, pairs: list[Example]) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of the task on one batch, and its gradients."""
    loss = state.task.loss(state.loaded, collate(pairs), CPU, 1 / len(pairs))
    return loss.item(), gradients_of(state, loss)


def published(
    state: State, pairs: list[Example], settings: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean published loss of pairs with constants, and its gradients."""
    total = torch.zeros(())
    for pair in pairs:
        chosen, rejected = (answer_log_prob(state.loaded, answer) for answer in pair.split())
        total = total + published_loss(
            settings["loss"],
            chosen,
            rejected,
            pair.constants or (0.0, 0.0),  # type: ignore[arg-type]
            settings["beta"],
            settings.get("label_smoothing", 0.0),
            settings.get("gamma", 0.0),
        )
    mean = total / len(pairs)
    return mean.item(), gradients_of(state, mean)


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of gradients, relative to the largest value."""
    assert found.keys() == wanted.keys()
    scale = max(float(value.abs().max()) for value in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_the_published_formula(
    tmp_path: Path, name: str, family: str
) -> None:
    """Three pairs of different lengths, packed in one sequence; the formula sees each alone."""
    state = make_pair_state(tmp_path, family, preference=LOSSES[name])
    pairs = with_reference(state, PAIRS)
    wanted, wanted_gradients = published(state, pairs, LOSSES[name])
    found, gradients = loss_of(state, pairs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert largest_difference(gradients, wanted_gradients) < 1e-5


@pytest.mark.parametrize("fault", ["swapped", "boundary", "reference"])
def test_the_comparison_with_the_formula_detects_a_fault(tmp_path: Path, fault: str) -> None:
    state = make_pair_state(tmp_path)
    settings = {"loss": "dpo", "beta": 0.1}
    pairs = with_reference(state, PAIRS)
    wanted, wanted_gradients = published(state, pairs, settings)
    faulty = {
        "swapped": lambda pair: _swapped(pair),
        "boundary": lambda pair: replace(
            pair, segments=(pair.segments[0] - 1, pair.segments[1] + 1)
        ),
        "reference": lambda pair: replace(pair, constants=pair.constants[::-1]),
    }[fault]
    found, gradients = loss_of(state, [faulty(pair) for pair in pairs])
    assert abs(found - wanted) > 1e-3
    assert largest_difference(gradients, wanted_gradients) > 1e-2


def _swapped(pair: Example) -> Example:
    first, second = pair.split()
    ids, labels = second.ids + first.ids, second.labels + first.labels
    return replace(pair, ids=ids, labels=labels, segments=pair.segments[::-1])


def test_before_training_dpo_is_log_2_and_rewards_are_0(tmp_path: Path) -> None:
    state = make_pair_state(tmp_path)
    zero_b(state)
    pairs = with_reference(state, PAIRS)
    metrics = MetricSums()
    loss = state.task.loss(state.loaded, collate(pairs), CPU, 1 / 3, metrics)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert {name: round(float(v), 5) for name, v in metrics.sums.items()} | {"accuracy": 0.0} == {
        "accuracy": 0.0,
        "margin": 0.0,
        "reward_chosen": 0.0,
        "reward_rejected": 0.0,
    }


def test_the_reference_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    """The constants do not change with the adapter, and the adapter is back afterwards."""
    state = make_pair_state(tmp_path)
    with_adapter = [float(answer_log_prob(state.loaded, a)[0].detach()) for a in PAIRS[0].split()]
    before = with_reference(state, PAIRS)
    after = [float(answer_log_prob(state.loaded, a)[0].detach()) for a in PAIRS[0].split()]
    assert after == with_adapter
    zero_b(state)
    without = [float(answer_log_prob(state.loaded, a)[0].detach()) for a in PAIRS[0].split()]
    assert before[0].constants == pytest.approx(without, rel=1e-6)
    assert abs(without[0] - with_adapter[0]) > 1e-3
    assert with_reference(state, PAIRS) == before


def test_evaluation_gives_the_mean_loss_accuracy_and_rewards(tmp_path: Path) -> None:
    state = make_pair_state(tmp_path)
    pairs = with_reference(state, PAIRS)
    score = state.task.evaluate(state.loaded, [collate(pairs[:2]), collate(pairs[2:])], CPU)
    rewards = [
        [
            0.1 * (float(answer_log_prob(state.loaded, answer)[0].detach()) - reference)
            for answer, reference in zip(pair.split(), pair.constants, strict=True)
        ]
        for pair in pairs
    ]
    margins = [chosen - rejected for chosen, rejected in rewards]
    wanted = {
        "accuracy": sum(margin > 0 for margin in margins),
        "margin": sum(margins),
        "reward_chosen": sum(reward for reward, _ in rewards),
        "reward_rejected": sum(reward for _, reward in rewards),
    }
    assert score.num_targets == 3
    assert score.loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3, rel=1e-5)
    # Rewards are 0.1 times differences of numbers near 100, which float32 rounds to 8e-6.
    assert score.metrics == pytest.approx(
        {name: value / 3 for name, value in wanted.items()}, abs=5e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_of_any_size_give_the_same_gradients(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_pair_state(tmp_path, preference=LOSSES[name])
    pairs = with_reference(state, PAIRS)
    wanted, wanted_gradients = loss_of(state, pairs)
    vocabulary = state.loaded.head.weight.shape[0]
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 3 * vocabulary)
    found, gradients = loss_of(state, pairs)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert largest_difference(gradients, wanted_gradients) < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_a_trained_head_gets_the_gradient_of_the_formula(tmp_path: Path, name: str) -> None:
    """Full fine-tuning; the base as it is now is the reference."""
    settings = {"adapter": {"method": "full"}, "base": {"bits": 16}}
    state = make_pair_state(tmp_path, preference=LOSSES[name], **settings)
    pairs = with_reference(state, PAIRS)
    with torch.no_grad():
        for parameter in state.trainable.values():
            parameter.mul_(1.05)
    wanted, wanted_gradients = published(state, pairs, LOSSES[name])
    found, gradients = loss_of(state, pairs)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert largest_difference(gradients, wanted_gradients) < 1e-4
