"""Activation policies: equal bits in every result, and which blocks run twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_cli.data.collate import collate
from qlora_cli.errors import RecipeError
from qlora_cli.nn.activation_policy import ActivationPolicy
from qlora_cli.train.step import train_step
from tests.helpers.families import MODEL_TYPES
from tests.helpers.training import ROWS, make_state

NUM_BLOCKS = 2
"""Blocks of the small models."""
POLICIES = (False, 0, 1, NUM_BLOCKS, True)


def after_two_steps(
    folder: Path, family: str, setting: bool | int, dropout: float = 0.0
) -> dict[str, Tensor]:
    """Return losses, gradient norms and parameters after two steps of two micro-batches."""
    adapter, train = {"dropout": dropout}, {"activation_checkpointing": setting}
    state = make_state(folder, family, adapter=adapter, train=train)
    torch.manual_seed(5)
    results = {}
    for step in range(2):
        outcome = train_step(state, [collate(ROWS[:2]), collate(ROWS[2:4])], 1e-2)
        results[f"step {step}"] = torch.tensor([outcome.loss, outcome.grad_norm])
    return results | {name: value.detach().clone() for name, value in state.trainable.items()}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_policy_gives_equal_bits(tmp_path: Path, family: str) -> None:
    wanted = after_two_steps(tmp_path, family, False)
    for setting in POLICIES[1:]:
        found = after_two_steps(tmp_path, family, setting)
        assert found.keys() == wanted.keys()
        assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.slow
def test_every_policy_draws_the_same_dropout_masks(tmp_path: Path) -> None:
    wanted = after_two_steps(tmp_path, "llama", False, dropout=0.3)
    for setting in POLICIES[1:]:
        found = after_two_steps(tmp_path, "llama", setting, dropout=0.3)
        assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_the_first_blocks_run_twice(tmp_path: Path) -> None:
    """Equal bits would show nothing if the setting were ignored."""
    for setting in POLICIES:
        state = make_state(tmp_path, train={"activation_checkpointing": setting})
        calls: list[int] = []
        count = calls.append
        for block in range(NUM_BLOCKS):
            layer = state.loaded.model.get_submodule(f"model.layers.{block}.mlp.up_proj")
            layer.register_forward_hook(lambda *_, block=block, count=count: count(block))
        train_step(state, [collate(ROWS[:1])], 1e-3)
        number = NUM_BLOCKS * setting if isinstance(setting, bool) else setting
        assert calls == [*range(NUM_BLOCKS), *reversed(range(number))], setting


def test_a_policy_can_be_replaced_between_steps(tmp_path: Path) -> None:
    wanted = after_two_steps(tmp_path, "llama", 0)
    state = make_state(tmp_path, "llama", train={"activation_checkpointing": 0})
    torch.manual_seed(5)
    for number in (0, NUM_BLOCKS):
        state.loaded.recomputation.policy = ActivationPolicy.recompute_first(number, NUM_BLOCKS)
        train_step(state, [collate(ROWS[:2]), collate(ROWS[2:4])], 1e-2)
    for name, value in state.trainable.items():
        assert torch.equal(value, wanted[name]), name


def test_evaluation_recomputes_nothing(tmp_path: Path) -> None:
    state = make_state(tmp_path, train={"activation_checkpointing": True})
    layer = state.loaded.model.get_submodule("model.layers.0.mlp.up_proj")
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    state.task.evaluate(state.loaded, [collate(ROWS[:1])], state.device)
    assert len(calls) == 1


def test_each_next_policy_keeps_half_of_the_blocks() -> None:
    numbers = []
    policy: ActivationPolicy | None = ActivationPolicy.recompute_first(2, 12)
    while policy is not None:
        assert (
            policy.actions == ("recompute",) * policy.num_recomputed + ("keep",) * policy.num_kept
        )
        numbers.append(policy.num_recomputed)
        policy = policy.next()
    assert numbers == [2, 7, 10, 11, 12]


def test_more_blocks_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"3 is more than the base's 2 blocks"):
        make_state(tmp_path, train={"activation_checkpointing": 3})
