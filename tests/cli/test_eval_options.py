"""Options of `qlora eval` that exclude or need each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.jobs import eval_tasks
from tests.helpers.cli_helpers import qlora


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name one of --data and --tasks"),
        (("--data", "x.jsonl", "--tasks", "arc_easy"), "name one of --data and --tasks"),
        (("--tasks", "arc_easy", "--generate", "out.jsonl"), "--generate: it needs --data"),
        (("--tasks", "arc_easy", "--max-new-tokens", "3"), "--max-new-tokens: it needs --generate"),
        (("--data", "x.jsonl", "--max-new-tokens", "3"), "--max-new-tokens: it needs --generate"),
        (("--data", "x.jsonl", "--beams", "3"), "--beams: it needs --generate"),
        (("--tasks", " , "), "--tasks: it names no task"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    outcome = qlora("eval", tmp_path, *options)
    assert outcome.code == 2
    assert message in outcome.err


def test_options_of_tasks_are_refused_with_rows() -> None:
    rows = ("starter", "--data", "x.jsonl")
    for option, outcome in {
        "--num-fewshot": qlora("eval", *rows, "--num-fewshot", "0"),
        "--limit": qlora("eval", *rows, "--limit", "2"),
        "--include-path": qlora("eval", *rows, "--include-path", "."),
        "--apply-chat-template": qlora("eval", *rows, "--apply-chat-template"),
    }.items():
        assert outcome.code == 2
        assert f"{option}: it needs --tasks" in outcome.err


def test_without_lm_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_tasks, "find_spec", lambda _: None)
    outcome = qlora("eval", "starter", "--tasks", "arc_easy")
    assert outcome.code == 2
    assert "pip install 'qlora-cli[eval]'" in outcome.err
