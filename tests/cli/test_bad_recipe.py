"""A recipe that is not valid: exit code 2, and every problem in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli_checks import assert_refused
from tests.helpers.cli_helpers import qlora


def test_all_problems_of_a_recipe_are_reported_at_once(job_recipe: Path) -> None:
    job_recipe.write_text(
        "model: {nam: x}\n"
        "base: {bits: 5}\n"
        "adapter: {rank: many, targets: []}\n"
        "data: {train: 3}\n"
        "train:\n"
        "  lr: fast\n"
        "  lr: slow\n"
        "trian: {}\n"
    )
    outcome = qlora("train", job_recipe, "train.seed=x", "data.seqlen=3")
    assert_refused(
        outcome,
        2,
        f"{job_recipe}:1: model.nam: unknown setting",
        f"{job_recipe}:1: model.name: is missing",
        f"{job_recipe}:2: base.bits: is 5; it must be auto, 4, 8 or 16",
        f"{job_recipe}:3: adapter.rank: is 'many'; it must be an integer",
        f"{job_recipe}:4: data.train: is 3; it must be a string",
        f"{job_recipe}:7: train.lr: is written twice",
        f"{job_recipe}:8: trian: unknown setting",
        "did you mean train?",
        "override train.seed=x: is 'x'; it must be an integer",
        "override data.seqlen=3: unknown setting data.seqlen",
        "did you mean data.seq_len?",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name: x", (":1", "cannot be read")),
        ("- a\n- b\n", ("is not a recipe",)),
        ("", ("model.name", "data.train", "is missing")),
        ("task: translation\nmodel: {name: x}\ndata: {train: y}\n", ("task", "classification")),
    ],
)
def test_a_text_that_is_not_a_recipe_is_refused(
    job_recipe: Path, text: str, words: tuple[str, ...]
) -> None:
    job_recipe.write_text(text)
    assert_refused(qlora("train", job_recipe), 2, job_recipe, *words)


def test_a_missing_recipe_file_is_refused(job_recipe: Path) -> None:
    assert_refused(
        qlora("train", job_recipe.with_name("jb.yaml")),
        2,
        "no such recipe",
        f"did you mean {job_recipe}",
    )
    assert_refused(qlora("train", job_recipe.parent), 2, "is a folder")
