"""Small mixtures of experts, and a recipe that adapts their experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_cli.recipe.schema import Recipe
from tests.helpers.runs import make_base, make_recipe, make_rows

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Type -> sizes. gpt_oss is stored as transposed stacks with biases, the others by expert."""


def make_moe(folder: Path, model_type: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a small mixture of experts with random weights and return its folder."""
    return make_base(folder, model_type, dtype=dtype, spread=0.1, **SETTINGS[model_type])


def expert_recipe(model: Path, folder: Path, **sections: Any) -> Recipe:
    """Return a recipe with adapters on attention and on experts. The run is `folder`/run."""
    adapter = {"targets": ["q", "v", "experts"], **sections.pop("adapter", {})}
    train = {"steps": 4, "grad_accum": 1, "lr": 1e-2, **sections.pop("train", {})}
    rows = make_rows(folder / "rows.jsonl")
    recipe = make_recipe(model, rows, adapter=adapter, train=train, **sections)
    return recipe.model_copy(update={"output": str(folder / "run")})
