"""Damaged and absurd recipes and overrides: only our own errors come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.recipe.describe import sections
from qlora_cli.recipe.load import load_recipe
from tests.helpers.fuzz import (
    absurd_values,
    changed_json,
    changed_values,
    damaged,
    fuzzed,
    only_own_errors,
    write,
)

pytestmark = pytest.mark.slow

RECIPE = {
    "model": {"name": "starter", "revision": None},
    "base": {"bits": 4, "quant_type": "nf4", "double_quant": True, "compute_dtype": "auto"},
    "adapter": {"rank": 8, "alpha": 16.0, "targets": ["q", "v"], "dropout": 0.1},
    "data": {"train": [{"path": "a.jsonl", "weight": 2.0}, "b"], "eval": 0.02, "seq_len": 64},
    "train": {"epochs": 1, "lr": 2e-4, "seed": 0, "log_to": [], "betas": [0.9, 0.999]},
    "task": "causal",
    "output": "runs/{name}",
}
YAML = b"""\
# A recipe.
model: {name: starter}
adapter:
  rank: 8
  targets: [q, v]
data:
  train: rows.jsonl
  columns: {prompt: "question", completion: 'answer'}
train: {lr: 1e-4, steps: !!int 10}
output: |
  runs/{name}
"""
KEYS = [f"{name}.{key}" for name, section in sections().items() for key in section.fields_by_key()]


@fuzzed()
@given(st.one_of(changed_json(RECIPE), damaged(YAML)))
def test_recipes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    with only_own_errors():
        load_recipe(write(file, content))


@fuzzed()
@given(
    st.sampled_from([*KEYS, *sections(), "output", "task", "", "x.y"]),
    st.one_of(st.text(max_size=30), absurd_values.map(json.dumps), changed_values(RECIPE).map(str)),
)
def test_overrides(tmp_path_factory: pytest.TempPathFactory, key: str, value: str) -> None:
    file = write(tmp_path_factory.getbasetemp() / "valid.yaml", json.dumps(RECIPE).encode())
    with only_own_errors():
        load_recipe(file, [f"{key}={value}"])


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    content = {**RECIPE, "train": {key: RECIPE["train"][key] for key in ("epochs", "lr", "seed")}}
    load_recipe(write(tmp_path / "recipe.yaml", json.dumps(content).encode()))
