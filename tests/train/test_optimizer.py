"""The registry of optimizers: it matches the schema and refuses what would not work."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.schema import Optimizer, Train
from qlora_cli.train.optimizer import OPTIMIZERS, make_optimizer
from tests.helpers.optimizers import parameters
from tests.helpers.runs import CPU


def test_schema_and_registry_name_the_same_optimizers() -> None:
    assert set(OPTIMIZERS) == set(get_args(Optimizer))


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paging_without_a_gpu_is_refused(name: Any) -> None:
    with pytest.raises(RecipeError, match=f"train.optimizer: {name} .* no GPU"):
        make_optimizer(Train(optimizer=name), parameters(), CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_optimizer_that_loses_updates_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RecipeError, match="no float32 copy of a 16-bit weight"):
        make_optimizer(Train(optimizer="adamw8bit"), parameters(dtype), CPU)
