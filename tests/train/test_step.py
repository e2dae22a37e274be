"""One optimizer step: gradient accumulation, activation checkpointing, clipping, float16, NaN."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_cli.data.collate import Batch, collate
from qlora_cli.data.packing import BatchSchedule
from qlora_cli.errors import QloraError
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.train import step as stepping
from qlora_cli.train.loss_scale import LossScale
from qlora_cli.train.state import State
from qlora_cli.train.step import train_step
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU
from tests.helpers.training import FLOAT16, LENGTHS, ROWS, make_nonfinite, make_state


def loss_and_gradients(
    state: State, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the unscaled gradients of a step that updates no parameter."""
    gradients: dict[str, Tensor] = {}

    def record_gradients(state: State, norm: float, lr: float) -> None:
        scale = state.loss_scale.value
        for name, parameter in state.trainable.items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad.float() / scale

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "_update", record_gradients)
        outcome = train_step(state, batches, 1e-3)
    return outcome.loss, gradients


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have 2 to 28 trained tokens, so a mean of the means would be another loss."""
    state = make_state(tmp_path, family)
    whole_loss, wanted = loss_and_gradients(state, [collate(ROWS)], monkeypatch)
    accumulated_loss, found = loss_and_gradients(
        state, [collate([row]) for row in ROWS], monkeypatch
    )
    assert accumulated_loss == pytest.approx(whole_loss, rel=1e-5)
    assert_same(found, wanted)
    means = [loss_and_gradients(state, [collate([row])], monkeypatch)[0] for row in ROWS]
    assert sum(means) / len(means) != pytest.approx(whole_loss, rel=1e-3)


def test_the_last_step_of_an_epoch_counts_its_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rows, four per step: the loss of the second step is the mean of its single row."""
    state = make_state(tmp_path)
    schedule = BatchSchedule(ROWS, seq_len=32, packing=False, micro_batch=1, grad_accum=4, seed=0)
    assert schedule.steps_per_epoch == 2
    last = schedule.step_batches(1)
    assert len(last) == 1
    row = next(row for row in ROWS if row.ids == last[0].input_ids[0].tolist())
    found_loss, found = loss_and_gradients(state, last, monkeypatch)
    wanted_loss, wanted = loss_and_gradients(state, [collate([row])], monkeypatch)
    assert (
        found_loss
        == wanted_loss
        == pytest.approx(CAUSAL.evaluate(state.loaded, [collate([row])], CPU).loss, rel=1e-5)
    )
    assert_same(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_activation_checkpointing_changes_no_gradient(
    tmp_path: Path, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for checkpointing in (False, True):
        state = make_state(
            tmp_path,
            family,
            base={"bits": 16 if method == "full" else 4},
            adapter={"method": method},
            train={"activation_checkpointing": checkpointing},
        )
        results.append(loss_and_gradients(state, [collate(ROWS[:3])], monkeypatch))
    (plain, wanted), (checkpointed, found) = results
    assert plain == checkpointed
    assert_same(found, wanted, rtol=1e-6)


def test_checkpointing_repeats_the_dropout_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second forward pass of a block must use the mask of the first one."""
    results = []
    for checkpointing in (False, True):
        state = make_state(
            tmp_path,
            adapter={"dropout": 0.3},
            train={"activation_checkpointing": checkpointing},
        )
        torch.manual_seed(5)
        results.append(loss_and_gradients(state, [collate(ROWS[:3])], monkeypatch))
    assert results[0][0] == results[1][0]
    assert_same(results[1][1], results[0][1], rtol=1e-6)


def test_checkpointing_runs_each_block_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal gradients would show nothing if the setting were ignored."""
    calls = {}
    for checkpointing in (False, True):
        state = make_state(tmp_path, train={"activation_checkpointing": checkpointing})
        layer = state.loaded.model.get_submodule("model.layers.0.mlp.up_proj")
        counted: list[int] = []
        layer.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        loss_and_gradients(state, [collate(ROWS[:1])], monkeypatch)
        calls[checkpointing] = len(counted)
    assert calls == {False: 1, True: 2}


def test_the_reported_loss_is_the_mean_over_trained_tokens(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    wanted = CAUSAL.evaluate(state.loaded, [collate([row]) for row in ROWS], CPU)
    outcome = train_step(state, [collate([row]) for row in ROWS], 0.0)
    assert outcome.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert outcome.tokens == sum(LENGTHS)
    assert wanted.num_targets == sum(row.num_targets for row in ROWS)


def test_clipping_limits_the_norm(tmp_path: Path) -> None:
    """AdamW's first moment is a tenth of the clipped gradient after one step."""
    for limit in (1e-3, None):
        state = make_state(tmp_path, train={"max_grad_norm": limit})
        outcome = train_step(state, [collate(ROWS)], 1e-3)
        moments = [state.optimizer.state[p]["exp_avg"] for p in state.trainable.values()]
        norm = 10 * torch.nn.utils.get_total_norm(moments).item()
        assert outcome.grad_norm > 1e-3
        assert norm == pytest.approx(limit or outcome.grad_norm, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_steps_decrease_the_loss(tmp_path: Path, family: str) -> None:
    state = make_state(tmp_path, family)
    losses = [train_step(state, [collate(ROWS)], 1e-2).loss for _ in range(12)]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_job(tmp_path: Path, value: float) -> None:
    state = make_state(tmp_path)
    make_nonfinite(state, value)
    before = {name: p.detach().clone() for name, p in state.trainable.items()}
    with pytest.raises(QloraError, match=r"step 1: the loss is .*not finite") as caught:
        train_step(state, [collate(ROWS)], 1e-3)
    assert caught.value.exit_code == 1
    assert "lower train.lr" in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in state.trainable.items())


def test_a_nan_in_a_gradient_alone_stops_the_job(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    parameter = next(iter(state.trainable.values()))
    parameter.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    with pytest.raises(QloraError, match="its gradients are not finite"):
        train_step(state, [collate(ROWS)], 1e-3)


def test_a_nan_in_the_second_micro_batch_is_detected(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    table = state.loaded.model.get_submodule("model.embed_tokens").weight
    with torch.no_grad():
        table[ROWS[1].ids[3]] = float("nan")
    batches = [collate([ROWS[0]]), collate([ROWS[1]])]
    with pytest.raises(QloraError, match="the loss is nan"):
        train_step(state, batches, 1e-3)


def test_float16_trains_under_a_loss_scale(tmp_path: Path) -> None:
    exact = make_state(tmp_path)
    half = make_state(tmp_path, **FLOAT16)
    assert half.loss_scale.needed
    assert not exact.loss_scale.needed
    # The random weights are large. This scale does not overflow, so that both do the same steps.
    half.loss_scale.value = 2.0**8
    losses = {
        name: [train_step(state, [collate(ROWS)], 5e-3).loss for _ in range(8)]
        for name, state in (("exact", exact), ("half", half))
    }
    assert losses["half"] == pytest.approx(losses["exact"], rel=0.03)


def test_float16_gradients_are_the_float32_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float16 gradients contain the loss scale; the optimizer gets them without it."""
    exact = loss_and_gradients(make_state(tmp_path), [collate(ROWS)], monkeypatch)
    state = make_state(tmp_path, **FLOAT16)
    state.loss_scale.value = 2.0**8
    half = loss_and_gradients(state, [collate(ROWS)], monkeypatch)
    assert half[0] == pytest.approx(exact[0], rel=1e-2)
    for name, wanted in exact[1].items():
        assert (half[1][name] - wanted).norm() / wanted.norm() < 0.05


def test_an_overflow_is_skipped_and_the_scale_halved(tmp_path: Path) -> None:
    state = make_state(tmp_path, **FLOAT16)
    state.loss_scale.value = 2.0**40
    before = {name: p.detach().clone() for name, p in state.trainable.items()}
    outcome = train_step(state, [collate(ROWS)], 1e-3)
    assert outcome.skipped
    assert state.loss_scale.value == 2.0**39
    assert state.step == 1
    assert not state.optimizer.state
    assert all(torch.equal(p, before[name]) for name, p in state.trainable.items())
    for _ in range(40):
        outcome = train_step(state, [collate(ROWS)], 1e-3)
        if not outcome.skipped:
            break
    assert not outcome.skipped, "halving must end the overflow"
    assert math.isfinite(outcome.loss)


def test_float16_stops_if_no_loss_scale_helps(tmp_path: Path) -> None:
    """The loss is finite, but a gradient is NaN at every scale."""
    state = make_state(tmp_path, **FLOAT16)
    parameter = next(iter(state.trainable.values()))
    parameter.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    for _ in range(int(math.log2(LossScale.FIRST / LossScale.LEAST))):
        assert train_step(state, [collate(ROWS[:1])], 1e-3).skipped
    with pytest.raises(QloraError, match="its gradients are not finite"):
        train_step(state, [collate(ROWS[:1])], 1e-3)


def test_bfloat16_needs_no_scale(tmp_path: Path) -> None:
    state = make_state(tmp_path, base={"compute_dtype": "bfloat16"})
    assert not state.loss_scale.needed
    losses = [train_step(state, [collate(ROWS)], 1e-2).loss for _ in range(6)]
    assert losses[-1] < losses[0]
