"""`qlora verify --gguf` compares GGUF files in llama.cpp. Skipped if llama_cpp is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import make_recipe, make_rows, make_run
from tests.helpers.vocabularies import make_model_with_tokenizer


def merged_with(folder: Path, *kinds: str) -> tuple[Path, Path]:
    """Return a run and its merge with GGUF files of these types."""
    base = make_model_with_tokenizer(
        folder / "base", "llama", spread=0.1, hidden_size=256, intermediate_size=256
    )
    run, _ = make_run(folder / "run", make_recipe(base, make_rows(folder / "rows.jsonl", num=3)))
    for kind in kinds:
        words = ("merge", run.path, "--out", folder / "out", "--base", "original", "--gguf", kind)
        outcome = qlora(*words)
        assert outcome.code == 0, outcome.err
    return run.path, folder / "out"


def test_kl_is_reported_per_type(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    run, out = merged_with(tmp_path, "f16", "q8_0")
    outcome = qlora("verify", out, "--against", run, "--gguf", "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    f16, q8_0 = outcome.json["files"]
    assert (f16["type"], q8_0["type"]) == ("F16", "Q8_0")
    assert 0 <= f16["mean_kl"] < q8_0["mean_kl"]
    assert f16["answers"] == 3
    outcome = qlora("verify", out, "--gguf", "--data", tmp_path / "rows.jsonl", "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.json["files"][0]["mean_kl"] == pytest.approx(f16["mean_kl"])


def test_wrong_metadata_is_found_by_the_predictions(tmp_path: Path) -> None:
    """The tensors of a file under another name are compared, but not its metadata."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    run, out = merged_with(tmp_path, "f16")
    file = (out / "model-F16.gguf").rename(out / "other.gguf")
    field = GGUFReader(file, "r+").get_field("llama.rope.freq_base")
    assert field is not None
    field.parts[-1][0] = np.float32(10.0)
    outcome = qlora("verify", out, "--against", run, "--gguf", "--json")
    assert outcome.code == 4, outcome.out
    assert "the mean KL from the merged model" in outcome.json["faults"][0]


def test_no_file_and_no_package_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("verify", tmp_path, "--against", tmp_path, "--gguf")
    assert "has no GGUF file" in qlora(*words).err
    (tmp_path / "model.gguf").touch()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # makes `import llama_cpp` fail
    outcome = qlora(*words)
    assert outcome.code == 2
    assert "pip install 'qlora-cli[llama]'" in outcome.err
