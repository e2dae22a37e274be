"""The grid of a sweep: values, cells, seeds, names, and cells that are the same or not possible."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import Problem, RecipeError, UsageError
from qlora_cli.recipe.grid import Axis, Grid, make_grid, parse_axis
from qlora_cli.recipe.load import load_recipe

TEXT = """\
model: {name: starter}
adapter: {rank: 4, alpha: 8}
data: {train: rows.jsonl}
output: sweeps/{name}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def names(grid: Grid) -> list[str]:
    return [run.name for run in grid.runs]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("adapter.rank=1,2,8", ("1", "2", "8")),
        ("train.lr=1e-4, 3e-4", ("1e-4", "3e-4")),
        ("adapter.targets=[q];[v];[q,v]", ("[q]", "[v]", "[q,v]")),
        ("adapter.targets=q,v;all", ("q,v", "all")),
        ("adapter.targets=q,v", ("q,v",)),
        ("data.train=a,b.jsonl;c.jsonl", ("a,b.jsonl", "c.jsonl")),
        ("base.bits=4,4,8", ("4", "8")),
        ("train.max_grad_norm=null;1.0", ("null", "1.0")),
        ("data.eval=", ("",)),
    ],
)
def test_the_values_of_a_setting(text: str, values: tuple[str, ...]) -> None:
    assert parse_axis(text) == Axis(text.partition("=")[0], values)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("adapter.rnk=1,2", "unknown setting"),
        ("adapter.rank", "is not an override"),
        ("adapter.rank=1,,2", "an empty value"),
        ("adapter.targets=[q;[v]", "not valid YAML"),
    ],
)
def test_a_wrong_axis_is_a_problem(text: str, what: str) -> None:
    problem = parse_axis(text)
    assert isinstance(problem, Problem)
    assert what in str(problem)


def test_a_cell_for_each_combination_and_a_run_for_each_seed(recipe: Path) -> None:
    grid = make_grid(recipe, ["adapter.rank=1,2", "adapter.targets=[q];[q,v]"], seeds=2)
    assert names(grid)[:3] == [
        "rank-1_targets-q_seed-0",
        "rank-1_targets-q_seed-1",
        "rank-1_targets-q-v_seed-0",
    ]
    assert len(grid.runs) == 8
    assert grid.folder == Path("sweeps/mine")
    assert grid.runs[3].settings == {"adapter.rank": "1", "adapter.targets": "[q,v]"}
    assert grid.runs[3].seed == grid.runs[3].recipe.train.seed == 1


def test_the_overrides_of_a_run_are_those_of_the_run_alone(recipe: Path) -> None:
    grid = make_grid(recipe, ["adapter.rank=1,2", "train.lr=1", "train.seed=7"], seeds=2)
    for run in grid.runs:
        assert load_recipe(recipe, run.overrides) == run.recipe
        assert run.recipe.output == f"sweeps/mine/{run.name}"
    assert [run.seed for run in grid.runs] == [7, 8, 7, 8]


def test_seeds_can_be_an_axis(recipe: Path) -> None:
    grid = make_grid(recipe, ["train.seed=3,9", "adapter.rank=1,2"])
    assert [(run.seed, run.settings) for run in grid.runs[:2]] == [
        (3, {"adapter.rank": "1"}),
        (3, {"adapter.rank": "2"}),
    ]


def test_cells_that_differ_in_a_useless_setting_are_one_cell(recipe: Path) -> None:
    grid = make_grid(recipe, ["adapter.method=lora,full", "base.bits=16", "adapter.rank=1,2"])
    assert names(grid) == ["method-lora_rank-1", "method-lora_rank-2", "method-full"]
    assert grid.runs[2].settings == {"adapter.method": "full"}
    assert any("adapter.rank=1 is dropped" in line for line in grid.dropped)
    assert any("adapter.alpha is dropped" in line for line in grid.dropped)


def test_a_combination_that_is_not_possible_is_reported(recipe: Path) -> None:
    grid = make_grid(recipe, ["adapter.method=lora,full", "base.bits=4,16"])
    assert names(grid) == ["method-lora_bits-4", "method-lora_bits-16", "method-full_bits-16"]
    ((settings, reason),) = grid.refused
    assert settings == {"adapter.method": "full", "base.bits": "4"}
    assert "set base.bits=16" in reason


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["adapter.rank=0,2"], "adapter.rank=0: is 0; it must be an integer"),
        (["adapter.method=lora,full"], "set base.bits=16"),
        (["adapter.method=full", "base.bits=16", "adapter.rank=1,2"], "has no effect"),
        (["train.steps=1,2", "train.epochs=1,2"], "leave one out"),
        (["adapter.rank=1,2", "train.lrr=1"], "unknown setting"),
    ],
)
def test_a_value_that_no_cell_can_have_is_refused(
    recipe: Path, texts: list[str], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        make_grid(recipe, texts)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "seeds", "message"),
    [
        (["adapter.rank=2"], None, "there is only one run"),
        ([], 1, "there is only one run"),
        (["train.seed=1,2"], 2, "the seeds are given twice"),
        (["output=a;b"], None, "a sweep has one folder"),
        ([f"adapter.rank={','.join(map(str, range(1, 10_002)))}"], None, "at most 10,000"),
    ],
)
def test_a_grid_that_is_none_is_refused(
    recipe: Path, texts: list[str], seeds: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_grid(recipe, texts, seeds)


def test_random_cells_are_a_part_of_the_grid_and_the_same_every_time(recipe: Path) -> None:
    texts = ["adapter.rank=1,2,3,4,5", "train.lr=1e-4,1e-3"]
    complete, sample = make_grid(recipe, texts), make_grid(recipe, texts, seeds=2, sample=3)
    assert len(sample.runs) == 6
    chosen = [run.settings for run in sample.runs[::2]]
    assert [run.settings for run in complete.runs if run.settings in chosen] == chosen
    assert names(sample) == names(make_grid(recipe, texts, seeds=2, sample=3))
    assert len(make_grid(recipe, texts, sample=99).runs) == 10


def test_names_are_short_unique_and_plain(recipe: Path) -> None:
    grid = make_grid(recipe, ["train.seed=1,2", "data.seed=1,2", "model.name=a/b;a-b"])
    assert len(set(names(grid))) == len(grid.runs)
    assert names(grid)[0].startswith("train.seed-1_data.seed-1_name-a-b-")
    long = make_grid(recipe, [f"data.train={'x' * 300};{'x' * 301}"])
    assert len(set(names(long))) == 2
    assert all(len(name) < 100 and "/" not in name for name in names(long))
