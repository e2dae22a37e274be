"""Sequences longer than the base's positions are refused by plan, data and train alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.data.positions import check_seq_len
from qlora_cli.errors import RecipeError
from qlora_cli.events import Silent
from qlora_cli.jobs import data, plan, train
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Data


class Config:
    """A config with 64 positions."""

    max_position_embeddings = 64


def settings(seq_len: int, packing: bool = False) -> Data:
    return Data(train="rows.jsonl", seq_len=seq_len, packing=packing)


def test_the_limit_itself_is_accepted() -> None:
    check_seq_len(settings(64), Config())
    check_seq_len(settings(10**6), object())
    check_seq_len(settings(60), Config(), 4)
    check_seq_len(settings(65, packing=True), Config())
    with pytest.raises(RecipeError, match=r"data.seq_len: is 65; the base has 64 positions"):
        check_seq_len(settings(65), Config())


def test_plan_data_and_train_refuse_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(
        "starter", ["data.seq_len=1024", "data.packing=false", f"output={tmp_path / 'run'}"]
    )
    messages = []
    for run in (
        lambda: plan.run(recipe, device_profile=None, fit=False, compare=False),
        lambda: data.run(recipe, show=0),
        lambda: train.run(recipe, recipe_path=None, resume=False, observer=Silent()),
    ):
        with pytest.raises(RecipeError) as caught:
            run()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert "the base has 512 positions" in messages[0]
    assert not (tmp_path / "run").exists()


def test_a_prefix_needs_positions_of_its_own() -> None:
    with pytest.raises(RecipeError, match=r"adapter\.prefix: 61 tokens and a prefix of 4"):
        check_seq_len(settings(61, packing=True), Config(), 4)
