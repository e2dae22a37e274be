"""With `--json`, a failing command prints one JSON object; a command names the next one."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from qlora_cli.cli import main
from qlora_cli.cli.output import emit_json, json_option, suggest
from qlora_cli.errors import QloraError
from tests.helpers.cli_helpers import qlora


def test_an_invalid_recipe_is_reported_as_one_object_with_every_problem(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {name: starter}\ndata: {train: 'starter:train', seq_lem: 5}\n")
    outcome = qlora("plan", recipe, "train.lr=-1", "--json")
    assert outcome.code == 2
    error = outcome.json["error"]
    assert error["kind"] == "RecipeError"
    assert len(error["problems"]) == 2
    assert all({"where", "what", "hint"} == problem.keys() for problem in error["problems"])
    assert outcome.json["exit_code"] == 2
    assert "error: " in outcome.err


@pytest.mark.parametrize("arguments", [("--json", "--nonsense"), ("--nonsense", "--json")])
def test_a_wrong_option_is_reported(arguments: tuple[str, ...]) -> None:
    outcome = qlora("report", "nowhere", *arguments)
    assert outcome.code == 2
    if outcome.out:
        assert "--nonsense" in outcome.json["error"]["what"]


def test_a_missing_run_is_reported() -> None:
    outcome = qlora("report", "nowhere", "--json")
    assert outcome.code == outcome.json["exit_code"] == 2
    assert "nowhere" in str(outcome.json["error"])


def test_without_json_nothing_is_printed_on_stdout() -> None:
    assert qlora("report", "nowhere").out == ""


def test_an_error_after_the_result_prints_no_second_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @click.command()
    @json_option
    def late(as_json: bool) -> None:
        emit_json({"done": as_json})
        raise QloraError("too late")

    monkeypatch.setitem(main.qlora.commands, "late", late)
    outcome = qlora("late", "--json")
    assert outcome.code == 1
    assert outcome.json == {"done": True}


def test_the_next_command_is_printed_on_stderr_and_can_be_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @click.command()
    def finish() -> None:
        suggest("merge", Path("my runs/x"), "--out", "merged")

    monkeypatch.setitem(main.qlora.commands, "finish", finish)
    outcome = qlora("finish")
    assert outcome.out == ""
    assert outcome.err == "next: qlora merge 'my runs/x' --out merged\n"
