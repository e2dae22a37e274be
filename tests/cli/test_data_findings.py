"""Findings in `qlora data` and `qlora train`; text of a file cannot control the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_checks import assert_refused
from tests.helpers.cli_helpers import qlora

ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b31m"
SHIFTED = [{"input_ids": [5, 6, 7, 8, 9], "labels": [6, 7, 8, 9, -100]}] * 2


def write_rows(file: Path, *rows: Any) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_a_warning_is_shown_by_both_commands_and_stops_neither(job_recipe: Path) -> None:
    rows = write_rows(job_recipe.with_name("odd.jsonl"), {"text": "ab\x07c"}, {"text": "abcdef"})
    shown = qlora("data", job_recipe, f"data.train={rows}")
    assert (shown.code, "[control-characters]" in shown.out) == (0, True)
    trained = qlora("train", job_recipe, f"data.train={rows}")
    assert trained.code == 0, trained.err
    assert "warning: " in trained.err
    assert "1 row (odd.jsonl:1)" in trained.err
    assert "[control-characters]" in trained.err


def test_an_error_stops_training_unless_it_is_allowed(job_recipe: Path) -> None:
    rows = write_rows(job_recipe.with_name("shifted.jsonl"), *SHIFTED)
    words = (
        "labels-shifted",
        "2 rows (shifted.jsonl:1, shifted.jsonl:2)",
        "--allow labels-shifted",
    )
    assert_refused(qlora("train", job_recipe, f"data.train={rows}"), 2, *words)
    assert not (job_recipe.parent / "run").exists()
    other = qlora("train", job_recipe, f"data.train={rows}", "--allow", "duplicates")
    assert_refused(other, 2, *words)
    allowed = qlora("train", job_recipe, f"data.train={rows}", "--allow", "labels-shifted")
    assert allowed.code == 0, allowed.err
    assert "labels-shifted" not in allowed.err
    # A resumed run has these rows already.
    resumed = qlora("train", job_recipe, f"data.train={rows}", "train.steps=4", "--resume")
    assert resumed.code == 0, resumed.err


def test_findings_in_json_have_code_severity_rows_and_remedy(job_recipe: Path) -> None:
    rows = write_rows(job_recipe.with_name("shifted.jsonl"), *SHIFTED)
    outcome = qlora("data", job_recipe, f"data.train={rows}", "--json")
    assert outcome.code == 2
    assert outcome.json["stops"] is True
    by_code = {found["code"]: found for found in outcome.json["findings"]}
    shifted = by_code["labels-shifted"]
    assert (shifted["severity"], shifted["rows"]) == ("error", 2)
    assert shifted["first"] == ["shifted.jsonl:1", "shifted.jsonl:2"]
    assert by_code["duplicates"]["severity"] == "warning"
    assert shifted["text"]
    assert shifted["remedy"]
    allowed = qlora("data", job_recipe, f"data.train={rows}", "--allow", "labels-shifted")
    assert (allowed.code, "labels-shifted" in allowed.out) == (0, True)


def test_an_unknown_code_is_refused_with_the_known_ones(job_recipe: Path) -> None:
    outcome = qlora("train", job_recipe, "--allow", "shifted")
    assert (outcome.code, outcome.out) == (2, "")
    assert "'shifted' is not one of" in outcome.err
    assert "labels-shifted" in outcome.err


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}])
def test_text_of_a_file_does_not_control_the_terminal(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    row = {"messages": [{"role": "user", "content": f"Hi {ESCAPE}"}]}
    row["messages"].append({"role": "assistant", "content": f"Yes {ESCAPE}"})
    shown = write_rows(job_recipe.with_name("shown.jsonl"), row)
    wrong = write_rows(job_recipe.with_name("wrong.jsonl"), {ESCAPE: "x", "txt": "y"})
    wide = ("model.name=starter", "data.seq_len=512")
    outcomes = [
        qlora("data", job_recipe, *wide, f"data.train={shown}", "--show", "1"),
        qlora("data", job_recipe, f"data.train={wrong}"),
        qlora("data", job_recipe, f"data.train={wrong}", "data.format=text"),
        qlora("data", job_recipe, f"data.train={wrong}", "--json"),
        qlora("train", job_recipe, f"data.train={wrong}"),
    ]
    assert [outcome.code for outcome in outcomes] == [0, 2, 2, 2, 2]
    # The other errors quote the names with Python's escapes.
    assert "\u241b" in outcomes[0].out
    assert "\u241b" in outcomes[1].err
    for outcome in outcomes:
        text = outcome.out + outcome.err
        assert not {"\x07", "\x9b"} & {*text}
        assert "\x1b]" not in text
        if not variables.get("FORCE_COLOR"):  # Then the only escapes are rich's own.
            assert "\x1b" not in text
