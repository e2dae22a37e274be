"""A loss that is not finite names the module that computed the first such value, and the row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_cli.data.collate import collate
from qlora_cli.data.encode import Example
from qlora_cli.errors import NotFinite
from qlora_cli.train.nonfinite import describe_nonfinite
from qlora_cli.train.state import State
from qlora_cli.train.step import train_step
from tests.helpers.families import MODEL_TYPES
from tests.helpers.training import make_state

RARE = 7
ROWS = [
    Example([1, 2, 3, 4], [1, 2, 3, 4], "rows.jsonl:1"),
    Example([5, RARE, 6], [5, RARE, 6], "rows.jsonl:2"),
    Example([8, 9], [8, 9], "rows.jsonl:3"),
]


@pytest.fixture(params=MODEL_TYPES)
def state(request: pytest.FixtureRequest, tmp_path: Path) -> State:
    return make_state(tmp_path, request.param)


def test_nothing_is_described_if_all_is_finite(state: State) -> None:
    assert describe_nonfinite(state, [collate(ROWS)]) is None


@torch.no_grad()
def test_the_row_of_a_token_is_named(state: State) -> None:
    table = state.loaded.model.get_submodule(state.loaded.family.token_embedding)
    table.weight[RARE] = torch.inf
    with torch.enable_grad(), pytest.raises(NotFinite) as caught:
        train_step(state, [collate(ROWS[:1]), collate(ROWS[1:])], 1e-3)
    assert f"computed by {state.loaded.family.token_embedding}" in str(caught.value)
    assert "for the row rows.jsonl:2" in str(caught.value)


@torch.no_grad()
def test_the_layer_of_an_adapter_is_named(state: State) -> None:
    name, parameter = next(
        (name, parameter)
        for name, parameter in reversed(state.trainable.items())
        if parameter.shape[0] > parameter.shape[1]
    )
    parameter.fill_(3e38)
    described = describe_nonfinite(state, [collate(ROWS)])
    assert described is not None
    linear = described.split("computed by ")[1].split(",")[0]
    assert name.startswith(linear)
