"""Settings that an override leaves without effect are dropped with a reason, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.load import load_recipe, load_with_dropped

TEXT = """\
model: {name: starter}
base: {quant_type: nf4}
adapter: {rank: 4, alpha: 8}
data: {train: rows.jsonl, eval: held-out.jsonl}
train: {epochs: 3, eval_every: 10, patience: 2}
"""
FULL = ("adapter.method=full", "base.bits=16")
HEAD = ("adapter.method=head", "task=classification")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("overrides", "dropped"),
    [
        (FULL, {"base.quant_type": 2, "adapter.rank": 3, "adapter.alpha": 3}),
        (HEAD, {"adapter.rank": 3, "adapter.alpha": 3}),
        (("train.steps=5",), {"train.epochs": 5}),
        (("data.eval=",), {"train.eval_every": 5, "train.patience": 5}),
        (("train.eval_every=",), {"train.patience": 5}),
        (("train.epochs=2",), {}),
    ],
)
def test_a_setting_of_the_file_is_dropped_with_its_place_and_the_override(
    recipe: Path, overrides: tuple[str, ...], dropped: dict[str, int]
) -> None:
    found = load_with_dropped(recipe, overrides).dropped
    assert found.keys() == dropped.keys()
    for key, line in dropped.items():
        assert found[key].startswith(f"{recipe}:{line}: {key} is dropped; it has no effect with ")
        assert found[key].rpartition(" ")[2] in overrides


def test_what_is_left_is_the_recipe_without_the_dropped_settings(recipe: Path) -> None:
    full = load_recipe(recipe, FULL)
    assert full.adapter.model_fields_set == {"method"}
    assert load_recipe(recipe, ["train.steps=5"]).train.model_fields_set.isdisjoint({"epochs"})


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ((*FULL, "adapter.rank=3"), "override adapter.rank=3"),
        (("train.steps=5", "train.epochs=2"), "override train.epochs=2"),
    ],
)
def test_overrides_that_contradict_each_other_are_refused(
    recipe: Path, overrides: tuple[str, ...], where: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    (problem,) = caught.value.problems
    assert problem.where == where


def test_a_file_that_contradicts_itself_is_refused(recipe: Path) -> None:
    recipe.write_text(TEXT.replace("rank: 4", "method: full, rank: 4"))
    with pytest.raises(RecipeError, match="no effect with method: full"):
        load_recipe(recipe, ["train.lr=1", "base.quant_type=", "base.bits=16"])


@pytest.mark.parametrize(
    ("adapter", "overrides", "where", "has_hint"),
    [
        ("", ("adapter.method=full", "base.quant_type="), "override adapter.method=full", False),
        ("", ("adapter.method=head",), "override adapter.method=head", False),
        ("", ("adapter.prefix=2", "task=preference"), "override adapter.prefix=2", False),
        ("", ("adapter.init=pissa", "adapter.method=dora"), "override adapter.init=pissa", False),
        ("init: pissa, ", ("base.cache=true",), "override base.cache=true", True),
        ("prefix: 2, init: pissa, ", ("train.lr=1",), "{file}:3", False),
    ],
)
def test_a_contradiction_has_the_place_of_a_setting_that_it_names(
    recipe: Path, adapter: str, overrides: tuple[str, ...], where: str, has_hint: bool
) -> None:
    recipe.write_text(TEXT.replace("rank: 4", f"{adapter}rank: 4"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    (problem,) = caught.value.problems
    assert problem.where == where.format(file=recipe)
    assert (problem.hint is not None) == has_hint


def test_an_override_is_dropped_only_if_the_caller_allows_it(recipe: Path) -> None:
    overrides = [*FULL, "adapter.rank=3", "adapter.alpha=2"]
    dropped = load_with_dropped(recipe, overrides, {"adapter.rank", "adapter.alpha"}).dropped
    assert dropped["adapter.rank"] == (
        "override adapter.rank=3 is dropped; it has no effect with adapter.method=full"
    )
    with pytest.raises(RecipeError, match="alpha"):
        load_with_dropped(recipe, overrides, {"adapter.rank"})


def test_of_two_overrides_that_exclude_each_other_none_is_dropped(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="leave one out"):
        load_with_dropped(recipe, ["train.steps=5", "train.epochs=2"], {"train.steps"})
