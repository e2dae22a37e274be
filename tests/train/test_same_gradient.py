"""The gradient of a step is the same however its rows are cut into micro-batches.

One micro-batch of all rows, one row at a time, rows that share sequences, micro-batches divided
after out of memory, and the last step of an epoch, which has fewer rows: for each task and family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.data.encode import Example
from qlora_cli.data.packing import BatchSchedule
from qlora_cli.train import step as stepping
from qlora_cli.train.state import State
from qlora_cli.train.step import train_step
from tests.helpers.marks import slow_after_first
from tests.helpers.pairs import make_pair_state, pair, with_reference
from tests.helpers.training import example, make_state

NUM = 11
"""Rows: a step of 8 and a last step of 3."""
LENGTHS = [5 + (7 * row) % 19 for row in range(NUM)]
TOLERANCE = 1e-6
"""Allowed difference between two gradients in float32, relative to their norm."""


def examples_of(state: State) -> list[Example]:
    if state.task.name == "causal":
        return [example(30 * row, LENGTHS[row], untrained=1 + row % 3) for row in range(NUM)]
    pairs = [pair(row, LENGTHS[row], LENGTHS[-row - 1]) for row in range(NUM)]
    return with_reference(state, pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


def state_of(folder: Path, task: str, family: str) -> State:
    make = {"causal": make_state, "preference": make_pair_state}[task]
    (folder / task).mkdir(exist_ok=True)
    return make(folder / task, family)


def schedule(rows: Sequence[Example], **settings: Any) -> BatchSchedule:
    return BatchSchedule(rows, **{"seq_len": 64, "packing": False, "seed": 0, **settings})


def gradient(state: State, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the gradients of all parameters of a step that updates none, as one vector."""
    parts: list[Tensor] = []

    def record(state: State, norm: float, lr: float) -> None:
        for parameter in state.trainable.values():
            assert parameter.grad is not None
            parts.append(parameter.grad.flatten().clone())

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "_update", record)
        train_step(state, batches, 1e-3)
    return torch.cat(parts)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


CASES = [(task, family) for family in ("llama", "gpt2") for task in ("causal", "preference")]


@pytest.mark.parametrize("case", slow_after_first(CASES), ids="-".join)
def test_cuts(folder: Path, case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(folder, *case)
    rows = examples_of(state)
    whole = schedule(rows, micro_batch=8, grad_accum=1)
    cuts = {
        "one row at a time": (schedule(rows, micro_batch=1, grad_accum=8), 1),
        "two rows at a time": (schedule(rows, micro_batch=2, grad_accum=4), 1),
        **{f"divided into {parts}": (whole, parts) for parts in (2, 4, 8)},
    }
    for step in (0, 1):
        assert len(whole.step_rows(step)[0]) == (8, 3)[step]
        wanted = gradient(state, whole.step_batches(step), monkeypatch)
        for name, (cut, parts) in cuts.items():
            batches = cut.step_batches(step, parts)
            assert len(batches) > 1
            found = gradient(state, batches, monkeypatch)
            assert difference(found, wanted) < TOLERANCE, (step, name)


@pytest.mark.parametrize("case", slow_after_first(CASES), ids="-".join)
def test_packing(folder: Path, case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are in one step, because packing changes which rows come together."""
    state = state_of(folder, *case)
    rows = examples_of(state)
    apart = schedule(rows, micro_batch=1, grad_accum=16).step_batches(0)
    assert len(apart) == NUM
    wanted = gradient(state, apart, monkeypatch)
    for micro_batch in (1, 2):
        packed = schedule(rows, packing=True, micro_batch=micro_batch, grad_accum=16)
        assert packed.steps_per_epoch == 1
        for parts in (1, 2):
            batches = packed.step_batches(0, parts)
            assert parts > 1 or len(batches) < NUM
            assert difference(gradient(state, batches, monkeypatch), wanted) < TOLERANCE


def test_another_row_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(folder, "causal", "llama")
    batches = schedule(examples_of(state), micro_batch=1, grad_accum=8).step_batches(0)
    wanted = gradient(state, batches, monkeypatch)
    assert difference(gradient(state, batches[1:], monkeypatch), wanted) > 100 * TOLERANCE
