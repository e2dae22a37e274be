"""Data files and rows that cannot be trained on: exit code 2, with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_checks import assert_folder_is_usable, assert_refused
from tests.helpers.cli_helpers import qlora


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["data.train", "data.eval"])
def test_a_missing_data_file_is_refused_with_similar_names(job_recipe: Path, setting: str) -> None:
    missing = job_recipe.with_name("row.jsonl")
    outcome = qlora("train", job_recipe, f"{setting}={missing}")
    assert_refused(outcome, 2, f"no file {missing}", job_recipe.with_name("rows.jsonl"))
    assert_folder_is_usable(job_recipe)


def write_rows(file: Path, *rows: object) -> Path:
    file.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return file


GOOD = {"text": "abcdef"}
ASKED = {"messages": [{"role": "user", "content": "Hello?"}]}
MASKED = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ("bad.jsonl", "no rows")),
        (["", " "], ("bad.jsonl", "no rows")),
        ([GOOD, {"txt": "x"}], ("1 of 2 rows", "bad.jsonl:2", "'txt'", "rename 'txt' to 'text'")),
        ([GOOD, {"text": 3}, {"text": None}], ("2 of 3", "bad.jsonl:2", "bad.jsonl:3", "is null")),
        (["[1]", GOOD, "{"], ("2 of 3", "bad.jsonl:1", "a list", "bad.jsonl:3", "broken JSON")),
        ([{"a": 1}], ("no known format", "bad.jsonl:1", "rename the fields")),
        ([MASKED, MASKED], ("2 of 2", "bad.jsonl:1", "bad.jsonl:2", "no token")),
        ([ASKED], ("bad.jsonl:1", "no assistant message to train on")),
        ([{"input_ids": [5, 999]}], ("bad.jsonl:1", "999", "the vocabulary ends at")),
        ([{"input_ids": [5, 6], "labels": [5]}], ("bad.jsonl:1", "1 labels for 2 input_ids")),
    ],
)
def test_invalid_rows_are_refused_with_file_and_line(
    job_recipe: Path, rows: list[Any], words: tuple[str, ...]
) -> None:
    bad = write_rows(job_recipe.with_name("bad.jsonl"), *rows)
    for command in ("train", "data"):
        assert_refused(qlora(command, job_recipe, f"data.train={bad}"), 2, *words)
    assert not (job_recipe.parent / "run").exists()


@pytest.mark.slow
def test_long_rows_are_refused_if_the_recipe_requires_it(job_recipe: Path) -> None:
    bad = write_rows(job_recipe.with_name("bad.jsonl"), GOOD, {"text": "x" * 40})
    words = ("bad.jsonl:2", "41 tokens", "longer than 32 tokens", "data.long_rows")
    for command in ("train", "data"):
        outcome = qlora(command, job_recipe, f"data.train={bad}", "data.long_rows=error")
        assert_refused(outcome, 2, *words)
    assert_folder_is_usable(job_recipe)


@pytest.mark.slow
def test_sequences_longer_than_the_positions_of_the_base_are_refused(job_recipe: Path) -> None:
    rows = write_rows(job_recipe.with_name("long.jsonl"), GOOD, {"text": "x" * 80})
    for command in ("train", "data"):
        outcome = qlora(
            command, job_recipe, f"data.train={rows}", "data.packing=false", "data.seq_len=128"
        )
        assert_refused(outcome, 2, "data.seq_len", "is 128", "64 positions", "data.seq_len=64")
    assert_folder_is_usable(job_recipe)
