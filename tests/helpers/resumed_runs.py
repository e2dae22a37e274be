"""Short runs to stop and resume, and their comparison with an uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps
from tests.helpers.runs import make_base, make_recipe, make_rows

STEPS = 5
"""Optimizer steps of a run."""


def make_bases(folder: Path, *families: str) -> Path:
    """Write `rows.jsonl` and a small model of each family to `folder`, and return it."""
    make_rows(folder / "rows.jsonl", num=17, length=12)
    for family in families:
        make_base(folder / family, family, spread=0.1)
    return folder


def recipe_of(bases: Path, output: Path, family: str = "llama", **sections: Any) -> Recipe:
    """Return the recipe of a run of `STEPS` steps.

    It has dropout, so that the random states matter, and two rows per sequence, so that packing
    matters. bases: folder of `make_bases`. sections: settings
    that differ.
    """
    sections = {"adapter": {"dropout": 0.2}, **sections}
    settings: dict[str, Any] = {"steps": STEPS, "grad_accum": 2, "lr": 1e-2, "warmup": 0.2}
    settings["keep_checkpoints"] = None
    sections["train"] = {**settings, **sections.get("train", {})}
    recipe = make_recipe(bases / family, bases / "rows.jsonl", **sections)
    return recipe.model_copy(update={"output": str(output)})


def losses(run: RunFolder) -> list[tuple[int, float, float, float]]:
    """Return (step, loss, learning rate, gradient norm) of each step in metrics.jsonl."""
    lines = read_steps(run.metrics)
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]


def assert_same_run(run: RunFolder, reference: RunFolder) -> None:
    """Assert that two runs are equal bit for bit.

    Compares the adapter's files, the metrics of every step, and the last checkpoint: optimizer
    states, loss scale and random states.
    """
    assert losses(run) == losses(reference)
    assert [line[0] for line in losses(run)] == list(range(1, STEPS + 1))
    files = [path.relative_to(run.adapter) for path in run.adapter.rglob("adapter_*")]
    assert len(files) in (2, 4)  # An adapter, and a prefix if there is one.
    for name in files:
        assert (run.adapter / name).read_bytes() == (reference.adapter / name).read_bytes()
    states = [
        torch.load(folder.checkpoint(STEPS) / "state.pt", weights_only=True)
        for folder in (run, reference)
    ]
    assert_equal(*states)


def assert_equal(value: Any, expected: Any, path: str = "state") -> None:
    """Assert that two nested values are equal, tensors in dtype and in every bit."""
    assert type(value) is type(expected), path
    if isinstance(value, torch.Tensor):
        assert value.dtype == expected.dtype, path
        assert torch.equal(value, expected), path
    elif isinstance(value, dict):
        assert value.keys() == expected.keys(), path
        for key in value:
            assert_equal(value[key], expected[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(expected), path
        for index, pair in enumerate(zip(value, expected, strict=True)):
            assert_equal(*pair, f"{path}.{index}")
    else:
        assert value == expected, path


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
    "lora+": {"adapter": {"dropout": 0.2, "lr_ratio": 8.0}},
    "ranks": {"adapter": {"dropout": 0.2, "ranks": {"q": 5, "down": 1}, "alphas": {"up": 2.5}}},
    "dora": {"adapter": {"dropout": 0.2, "method": "dora"}},
    "prefix": {"adapter": {"dropout": 0.2, "prefix": 3}},
    "pissa": {"adapter": {"dropout": 0.2, "init": "pissa"}},
    "loftq, host": {
        "adapter": {"init": "loftq"},
        "base": {"residency": "host"},
        "train": {"activation_checkpointing": 1},
    },
    "host": {"base": {"residency": "host"}, "train": {"activation_checkpointing": 1}},
    "mixed base": {"base": {"overrides": {"down": 8, "*.0.*": 16}}},
    "gpt2, without packing": {"family": "gpt2", "data": {"packing": False}},
    "full": {"base": {"bits": 16}, "adapter": {"method": "full"}},
}
"""Name of a case -> what differs from the default recipe."""
