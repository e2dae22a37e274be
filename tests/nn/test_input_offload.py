"""Inputs of recomputed blocks in host memory: equal bits, and less planned memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from qlora_cli.data.collate import collate, largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import RecipeError
from qlora_cli.nn.input_offload import InputOffload
from qlora_cli.plan.dry_run import DryRun
from qlora_cli.plan.planner import Planner
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.state import State
from qlora_cli.train.step import train_step
from tests.helpers.training import LENGTHS, ROWS, make_state

GPU = DeviceProfile("cuda", "a GPU", 2**34, (8, 9), 128)
BLOCKS, TOKENS, HIDDEN = 7, 512, 256
INPUT_BYTES = TOKENS * HIDDEN * 2


def after_two_steps(state: State) -> dict[str, Tensor]:
    torch.manual_seed(5)
    for _ in range(2):
        train_step(state, [collate(ROWS[:2]), collate(ROWS[2:4])], 1e-2)
    return {name: value.detach().clone() for name, value in state.trainable.items()}


def offloaded(folder: Path, number: bool | int = True) -> tuple[State, InputOffload]:
    state = make_state(folder, train={"activation_checkpointing": number})
    state.loaded.recomputation.offload = offload = InputOffload()
    return state, offload


@pytest.mark.parametrize("number", [1, 2])
def test_bits_are_equal_and_every_input_is_copied(tmp_path: Path, number: int) -> None:
    wanted = after_two_steps(make_state(tmp_path, train={"activation_checkpointing": number}))
    state, offload = offloaded(tmp_path, number)
    found = after_two_steps(state)
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    width = state.loaded.config.hidden_size
    tokens = sum(LENGTHS[:4])
    # The input of the last recomputed block is still on the device when it is needed.
    assert offload.copied_bytes == 2 * tokens * width * 4 * (2 * number - 1)
    assert not [at for at in offload._order if at() is not None], "all are freed"


def test_a_copy_that_is_lost_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = after_two_steps(make_state(tmp_path, train={"activation_checkpointing": True}))
    monkeypatch.setattr(InputOffload, "_copy", lambda self, target, *_: target.zero_())
    found = after_two_steps(offloaded(tmp_path)[0])
    assert any(not torch.equal(found[name], wanted[name]) for name in found)


def test_a_pass_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    wanted = after_two_steps(make_state(tmp_path, train={"activation_checkpointing": True}))
    state, _ = offloaded(tmp_path)
    loss = state.task.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state.task), "loss", lambda *args: (loss(*args[1:]), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train_step(state, [collate(ROWS[:2])], 1e-2)
    found = after_two_steps(state)
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_a_cpu_and_kept_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not support") as caught:
        make_state(tmp_path, train={"activation_checkpointing": True, "offload_inputs": True})
    assert "there is no GPU" in str(caught.value.problems)
    train = {"activation_checkpointing": False, "offload_inputs": True}
    with pytest.raises(ValueError, match="needs blocks"):
        Recipe.model_validate({"model": {"name": "x"}, "data": {"train": ""}, "train": train})


def planned(
    capacity: int = 2**34, tokens: int = TOKENS, **train: Any
) -> tuple[Recipe, Any, DeviceProfile]:
    profile = replace(GPU, capacity_bytes=capacity)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=HIDDEN,
        intermediate_size=704,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    content = {
        "model": {"name": "x"},
        "adapter": {"targets": "all"},
        "data": {"train": "", "seq_len": tokens},
        "train": train,
    }
    return resolve(Recipe.model_validate(content), profile)[0], config, profile


def test_a_plan_has_three_inputs_on_the_device() -> None:
    recipe, config, profile = planned(activation_checkpointing=True, loss_chunk=64)
    batch = largest_batch(TOKENS, 1, config.vocab_size)
    peaks = []
    for moved in (False, True):
        changed = with_settings(recipe, "train", offload_inputs=moved)
        plan = DryRun(changed, config, profile, [batch] * 2).plan(BLOCKS)
        peaks.append(next(phase for phase in plan.phases if phase.name == "step").peak_bytes)
    saved = (peaks[0] - peaks[1]) / INPUT_BYTES
    assert BLOCKS - 3 <= saved <= BLOCKS - 1


@pytest.mark.slow
def test_inputs_are_moved_only_if_nothing_else_fits() -> None:
    recipe, config, profile = planned()
    large = Planner(config, profile).settle(recipe)
    assert large.recipe.train.offload_inputs == "auto"
    recipe, config, profile = planned(2**25, 8192)
    small = Planner(config, profile).settle(recipe)
    assert small.recipe.train.offload_inputs is True
    keys = {choice.key for choice in small.choices}
    assert keys >= {"train.activation_checkpointing", "train.offload_inputs"}
    recipe, config, profile = planned(2**25, 8192, offload_inputs=False)
    kept = Planner(config, profile).settle(recipe)
    assert kept.recipe.train.offload_inputs is False
    assert small.plan.needed_bytes < kept.plan.needed_bytes
