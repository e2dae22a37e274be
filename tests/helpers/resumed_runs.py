"""Short runs to stop and resume, and their comparison with an uninterrupted run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from tests.helpers.runs import make_recipe

STEPS = 5


def recipe_of(bases: Path, output: Path, family: str = "llama", **sections: Any) -> Recipe:
    """Dropout, so that random states matter; two rows a sequence, so that packing does."""
    sections = {"adapter": {"dropout": 0.2}, **sections}
    settings = {"steps": STEPS, "grad_accum": 2, "lr": 1e-2, "warmup": 0.2}
    sections["train"] = {**settings, **sections.get("train", {})}
    recipe = make_recipe(bases / family, bases / "rows.jsonl", **sections)
    return recipe.model_copy(update={"output": str(output)})


def losses(run: RunFolder) -> list[tuple[int, float, float, float]]:
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """Adapter bytes, every line's figures, optimizer states, loss scale and random states."""
    assert losses(one) == losses(other)
    assert [line[0] for line in losses(one)] == list(range(1, STEPS + 1))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one.adapter / name).read_bytes() == (other.adapter / name).read_bytes()
    states = [
        torch.load(run.checkpoint(STEPS) / "state.pt", weights_only=True) for run in (one, other)
    ]
    compare(*states)


def compare(one: Any, other: Any, path: str = "state") -> None:
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            compare(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            compare(*pair, f"{path}.{index}")
    else:
        assert one == other, path


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw8bit": {
        "train": {"optimizer": "adamw8bit"},
        "adapter": {"dropout": 0.2, "rank": 64, "alpha": 64.0},
    },
    "float16": {
        "base": {"compute_dtype": "float16"},
        "adapter": {"dropout": 0.2, "dtype": "float16"},
    },
    "gpt2, rows alone": {"family": "gpt2", "data": {"packing": False}},
    "full": {"base": {"bits": 16}, "adapter": {"method": "full"}},
}
