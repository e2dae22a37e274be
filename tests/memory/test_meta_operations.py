"""Operations on meta tensors that are remembered have the same outputs and work as torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from qlora_cli.data.encode import Example
from qlora_cli.memory.device import profile_of
from qlora_cli.memory.meta_operations import MetaOperations
from qlora_cli.memory.work import work_of
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.proof.small_config import small_config
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.causal import CAUSAL

ATEN: Any = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (ATEN.mul.Tensor, (meta(2, 3), 2.0), {}),
    (ATEN.mul.Tensor, (meta(2, 3, dtype=torch.int64), 1), {}),
    (ATEN.mul.Tensor, (meta(2, 3, dtype=torch.int64), 1.0), {}),
    (ATEN.mul.Tensor, (meta(2, 3).t(), meta(3, 2)), {}),
    (ATEN.mm.default, (meta(2, 3), meta(3, 4, dtype=torch.float32)), {}),
    (ATEN._to_copy.default, (meta(2, 3),), {"dtype": torch.bfloat16}),
    (ATEN.cat.default, ([meta(2, 3), meta(5, 3)],), {}),
    (ATEN.mean.dim, (meta(2, 3), [-1], True), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS)
def test_a_remembered_output_is_that_of_torch(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    operations, expected = MetaOperations(), func(*args, **kwargs)
    for other in CALLS:
        operations.run(*other)
    output, work = operations.run(func, args, kwargs)
    assert form(output) == form(expected)
    assert output.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert work == work_of(func, args, kwargs, expected)
    again, _ = operations.run(func, args, kwargs)
    assert again.untyped_storage()._cdata != output.untyped_storage()._cdata


def test_views_and_changed_inputs_are_not_remembered() -> None:
    operations, x = MetaOperations(), meta(2, 3)
    for _ in range(2):
        view, work = operations.run(ATEN.view.default, (x, [3, 2]), {})
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert work is None
        assert operations.run(ATEN.add_.Tensor, (x, x), {})[0] is x
        assert operations.run(ATEN.add.out, (x, x), {"out": x})[0] is x


def test_a_tensor_with_values_is_computed() -> None:
    operations = MetaOperations()
    for value in (1.0, 2.0):
        output, _ = operations.run(ATEN.mul.Tensor, (torch.full((2,), value), 3.0), {})
        assert output.tolist() == [3 * value] * 2


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3_moe"])
def test_a_plan_does_not_depend_on_what_is_remembered(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(AutoConfig.for_model(model_type))
    content: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": ""}}
    content["train"] = {"activation_checkpointing": True}
    recipe = Recipe.model_validate(content)
    profile = profile_of(torch.device("cpu"))
    recipe = resolve(recipe, profile)[0]
    rows = [Example([5] * length, [5] * length, "row") for length in (13, 9)]
    batch = CAUSAL.collate(rows)

    def plan() -> Any:
        return dry_run(recipe, config, profile, [batch]).phases

    remembered = plan()
    run: Callable[..., Any] = MetaOperations.run
    monkeypatch.setattr(MetaOperations, "run", lambda _, *call: run(MetaOperations(), *call))
    assert plan() == remembered
