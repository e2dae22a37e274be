"""Options that select a checkpoint (`--step`) and options of sampling (`--top-p` and others)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

PROMPT = ("--prompt", "name: Copper Swan", "--max-new-tokens", "5")


def test_a_checkpoint_is_merged(run: Path, tmp_path: Path) -> None:
    outcome = qlora("merge", run, "--out", tmp_path / "merged", "--step", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert qlora("verify", tmp_path / "merged", "--against", run).code == 0


def test_a_checkpoint_generates_and_is_evaluated(run: Path, held_out: Path) -> None:
    outcome = qlora("generate", run, *PROMPT, "--step", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["text"]
    last = qlora("eval", run, "--data", held_out, "--json").json["loss"]
    earlier = qlora("eval", run, "--data", held_out, "--step", "2", "--json")
    assert earlier.code == 0, earlier.err
    assert earlier.json["loss"] != last


def test_a_missing_checkpoint_is_refused(run: Path) -> None:
    outcome = qlora("generate", run, *PROMPT, "--step", "77")
    assert outcome.code == 2, outcome.err
    assert "77" in outcome.err


def test_sampling_repeats_with_the_same_seed(run: Path) -> None:
    sampling = ("--temperature", "1.5", "--top-p", "0.9", "--seed", "3")
    texts = [qlora("generate", run, *PROMPT, *sampling, "--json") for _ in range(2)]
    assert texts[0].code == 0, texts[0].err
    assert texts[0].json["text"] == texts[1].json["text"]


def test_a_chat_takes_the_sampling_options(run: Path) -> None:
    options = ("--system", "Be brief.", "--temperature", "1.5", "--top-p", "0.9", "--seed", "3")
    more = ("--stop", "zzz", "--step", "2", "--max-new-tokens", "5")
    answers = [qlora("chat", run, *options, *more, stdin="Hello\n\n") for _ in range(2)]
    assert answers[0].code == 0, answers[0].err
    assert answers[0].out == answers[1].out
