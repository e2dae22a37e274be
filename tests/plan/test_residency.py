"""A base is shared among devices only if the recipe may name `base.residency: shard` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_cli.plan.residency import other_residencies
from tests.helpers.runs import make_recipe


@pytest.mark.parametrize("adapter", [{"prefix": 4}, {"init": "pissa"}, {"init": "loftq"}, {}])
def test_what_cannot_be_shared_is_not_shared_by_auto(adapter: dict[str, Any]) -> None:
    base, rows = Path("base"), Path("rows.jsonl")
    recipe = make_recipe(base, rows, adapter=adapter)
    assert other_residencies(recipe, 1) == ["host"]
    if not adapter:
        assert other_residencies(recipe, 2) == ["shard", "host"]
        return
    assert other_residencies(recipe, 2) == ["host"]
    with pytest.raises(ValidationError, match="residency: shard"):
        make_recipe(base, rows, adapter=adapter, base={"residency": "shard"})
