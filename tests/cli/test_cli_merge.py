"""`qlora merge` with several adapters and with a GGUF file, and `qlora verify` after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow


def test_two_halves_of_an_adapter_are_the_adapter(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    outcome = qlora("merge", run, "--out", out, "--weight", "0.5", "--with", f"{run}=0.5", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["dtype"] == "float16"
    assert outcome.json["dtype_reason"] == "the default; the model fits its range"
    adapters = json.loads((out / "merge.json").read_text())["settings"]["adapters"]
    assert [adapter["weight"] for adapter in adapters] == [0.5, 0.5]
    outcome = qlora("verify", out, "--against", run, "--json")
    assert (outcome.code, outcome.json["faults"]) == (0, []), outcome.err
    assert 0 <= outcome.json["greedy_agreement"] <= outcome.json["greedy_tokens"] <= 64


@pytest.mark.parametrize("word", ["nan", "much", "inf"])
def test_an_invalid_weight_is_a_usage_error(word: str, run: Path, tmp_path: Path) -> None:
    for option, value in (("--with", f"{run}={word}"), ("--weight", word)):
        outcome = qlora("merge", run, "--out", tmp_path / "out", option, value)
        assert outcome.code == 2
        assert option in outcome.err


def test_a_missing_adapter_is_a_usage_error(run: Path, tmp_path: Path) -> None:
    outcome = qlora("merge", run, "--out", tmp_path / "out", "--with", tmp_path / "gone")
    assert outcome.code == 2
    assert "adapter_config.json" in outcome.err


def test_a_gguf_file_is_written_next_to_the_checkpoint(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    outcome = qlora("merge", run, "--out", out, "--gguf", "f16", "--json")
    assert outcome.code == 0, outcome.err
    assert (out / "model-F16.gguf").is_file()
    assert "model-F16.gguf" in outcome.err
    assert qlora("verify", out, "--against", run, "--json").code == 0


def test_an_unknown_encoding_is_a_usage_error(run: Path, tmp_path: Path) -> None:
    outcome = qlora("merge", run, "--out", tmp_path / "merged", "--gguf", "q4")
    assert outcome.code == 2
    assert "--gguf" in outcome.err
    assert not (tmp_path / "merged").exists()


def test_comparing_gguf_files_needs_one(run: Path, merged: Path) -> None:
    outcome = qlora("verify", merged, "--against", run, "--gguf")
    assert outcome.code == 2
    assert "has no GGUF file" in outcome.err
