"""`qlora verify --server` names the address that it cannot use, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli_helpers import qlora


def test_a_server_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    address = "http://127.0.0.1:9"
    outcome = qlora(
        "verify", tmp_path, "--against", tmp_path, "--server", address, "--name", "tuned"
    )
    assert outcome.code == 1
    assert f"{address}/v1/models" in outcome.err
    assert "cannot be reached" in outcome.err


def test_a_name_without_a_server_and_a_wrong_address_are_refused(tmp_path: Path) -> None:
    outcome = qlora("verify", tmp_path, "--against", tmp_path, "--name", "tuned")
    assert outcome.code == 2
    assert "add --server" in outcome.err
    outcome = qlora("verify", tmp_path, "--against", tmp_path, "--server", "localhost")
    assert outcome.code == 2
    assert "is not an address" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the run that was merged with --against RUN"),
        (("--gguf",), "or rows with --data FILE"),
        (("--server", "http://127.0.0.1:9"), "name the run that was merged with --against RUN"),
        (("--gguf", "--against", ".", "--data", "rows.jsonl"), "name one of them"),
        (("--gguf", "--server", "http://127.0.0.1:9"), "name one of them"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    outcome = qlora("verify", tmp_path, *words)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.replace("│", " ").split())


def test_bits_and_rows_belong_to_one_verification_each(tmp_path: Path) -> None:
    outcome = qlora("verify", tmp_path, "--against", tmp_path, "--bits", "8")
    assert outcome.code == 2
    assert "add --server" in outcome.err
    outcome = qlora("verify", tmp_path, "--data", "rows.jsonl")
    assert outcome.code == 2
    assert "--data is for --gguf" in outcome.err
