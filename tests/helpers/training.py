"""A training state and a few rows, for tests of single optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.files.locate import read_config
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.family import open_source
from qlora_cli.train.state import State, build_state
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows, stir

LENGTHS = (5, 17, 3, 30, 11)


def example(start: int, length: int, untrained: int = 1) -> Example:
    """untrained: tokens at the front without a label, as a prompt has."""
    ids = [3 + (start + 11 * i + i * i) % 250 for i in range(length)]
    return Example(ids, [-100] * untrained + ids[untrained:], f"row {start}")


ROWS = [example(40 * i, length, untrained=1 + i % 2) for i, length in enumerate(LENGTHS)]


def make_state(folder: Path, family: str = "llama", **sections: Any) -> State:
    base = folder / family
    if not base.exists():
        make_base(base, family, spread=0.15)
    recipe = make_recipe(base, make_rows(folder / "rows.jsonl"), **sections)
    config = read_config(base / "config.json")
    request = ModelRequest(
        recipe, config, lambda _, found: open_source(base, found), CPU, profile_of(CPU)
    )
    state = build_state(request)
    stir(state.loaded)
    return state


def poison(state: State, value: float) -> None:
    """One weight of the final norm: nothing downstream is finite."""
    with torch.no_grad():
        state.loaded.model.get_submodule("model.norm").weight[0] = value


HALF = {"base": {"compute_dtype": "float16"}, "adapter": {"dtype": "float16"}}
