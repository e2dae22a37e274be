"""A training state and a few rows, for tests of single optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.files.locate import read_config
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.train.state import State, build_state
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows, randomize_b

LENGTHS = (5, 17, 3, 30, 11)
"""Tokens of each of the rows."""


def example(start: int, length: int, untrained: int = 1) -> Example:
    """Return an encoded row.

    untrained: number of leading tokens without a label, such as those of a prompt.
    """
    ids = [3 + (start + 11 * i + i * i) % 250 for i in range(length)]
    return Example(ids, [-100] * untrained + ids[untrained:], f"row {start}")


ROWS = [example(40 * i, length, untrained=1 + i % 2) for i, length in enumerate(LENGTHS)]


def make_state(folder: Path, family: str = "llama", **sections: Any) -> State:
    """Return the training state of a small model, with random values in B.

    sections: settings of the recipe that differ.
    """
    base = folder / family
    if not base.exists():
        make_base(base, family, spread=0.15)
    recipe = make_recipe(base, make_rows(folder / "rows.jsonl"), **sections)
    config = read_config(base / "config.json")
    request = ModelRequest(
        recipe, config, lambda _, found: open_source(base, found), CPU, profile_of(CPU)
    )
    state = build_state(request)
    randomize_b(state.loaded)
    return state


def make_nonfinite(state: State, value: float) -> None:
    """Set one weight of the final norm to `value`, so that every loss becomes NaN or infinite."""
    with torch.no_grad():
        state.loaded.model.get_submodule("model.norm").weight[0] = value


FLOAT16 = {"base": {"compute_dtype": "float16"}, "adapter": {"dtype": "float16"}}
"""Settings for float16 in the forward pass and in the adapter."""
