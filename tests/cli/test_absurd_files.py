"""Files with absurd content: one clear error, never "a bug in qlora", whatever reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.cli_checks import assert_refused
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

Change = Callable[[Path], object]


def set_value(file: str, key: str, value: object) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {key: value}))

    return change


def set_content(file: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data)


ROWS = {
    "digits": '{"text": "a", "n": ' + "9" * 4400 + "}",
    "deep": "[" * 100_000,
    "half a character": '{"text": "\\ud800"}',
    "null": '{"text": null}',
    "a list": '{"text": [1]}',
    "functions": '{"messages": [{"role": "user", "content": "a"}], "functions": 1.5}',
    "a mask": '{"input_ids": [1, 2], "attention_mask": "x"}',
    "a large id": '{"input_ids": [99999999999999999999999]}',
    "a negative id": '{"input_ids": [-5]}',
    "messages": '{"messages": true}',
    "a message": '{"messages": ["a"]}',
    "a role": '{"messages": [{"role": 5, "content": "a"}]}',
}


@pytest.mark.parametrize("how", ROWS)
def test_rows(how: str, job_recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "absurd.jsonl"
    rows.write_text(ROWS[how] + "\n")
    outcome = qlora("data", job_recipe, f"data.train={rows}", "--show", "0")
    assert_refused(outcome, 2, "absurd.jsonl:1")


def test_parquet_files(job_recipe: Path, tmp_path: Path) -> None:
    texts = pa.array([b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "bytes.parquet")
    (tmp_path / "garbage.parquet").write_bytes(b"PAR1garbagePAR1")
    for name in ("bytes.parquet", "garbage.parquet"):
        outcome = qlora("data", job_recipe, f"data.train={tmp_path / name}")
        assert_refused(outcome, 2, name, "not a readable Parquet file")


BASES: dict[str, Change] = {
    **{
        f"{key}={str(value)[:9]}": set_value("config.json", key, value)
        for key, value in (
            *(("num_attention_heads", 0), ("hidden_act", "evil"), ("dtype", "evil"), ("dtype", 5)),
            *(("pad_token_id", 99999), ("id2label", 5), ("vocab_size", 10**30)),
            *(("hidden_size", 10**30), ("num_hidden_layers", 2**40), ("rope_scaling", 5)),
            *(("head_dim", 0), ("intermediate_size", -1), ("max_position_embeddings", "x")),
        )
    },
    "length of the tokenizer": set_value("tokenizer_config.json", "model_max_length", []),
    "code of the tokenizer": set_value("tokenizer_config.json", "auto_map", "x"),
    "added tokens": set_value("tokenizer.json", "added_tokens", "x"),
    "model of the tokenizer": set_value("tokenizer.json", "model", 5),
}


@pytest.mark.parametrize("how", BASES)
def test_bases(how: str, job_recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    BASES[how](base)
    outcome = qlora("train", job_recipe, f"model.name={base}")
    assert_refused(outcome, 2)
    assert str(base) in outcome.err or "model.name: " in outcome.err


@pytest.mark.parametrize("name", [5, None, "x" * 5000])
def test_names_in_an_index(name: object, job_recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    outcome = qlora("train", job_recipe, f"model.name={base}")
    assert_refused(outcome, 2, index, "damaged index")


def make_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


LINE: dict[str, Any] = {"step": 1, "loss": "x", "lr": [], "grad_norm": None, "tokens": {}}

RUNS: dict[str, Change] = {
    **{
        f"{key}={value}": set_value("run.json", key, value)
        for key, value in (
            *(("recipe", "x"), ("base_folder", -1), ("result", "x"), ("steps", "x")),
            *(("checksums", "x"), ("versions", "x"), ("base_fingerprint", 5), ("data_digest", 5)),
        )
    },
    "run.json is a list": set_content("run.json", "[1]"),
    "run.json is no text": set_content("run.json", b"\xff\xfe"),
    "a line of metrics": set_content("metrics.jsonl", json.dumps(LINE) + "\n"),
    "metrics are a folder": make_folder("metrics.jsonl"),
    "memory has wrong types": set_content("memory.json", '{"phases": 5}'),
    "memory is a list": set_content("memory.json", "[]"),
    "adapter has wrong types": set_content("adapter/adapter_config.json", '{"r": "x"}'),
}


@pytest.mark.parametrize("how", RUNS)
def test_runs(how: str, trained_recipe: Path, tmp_path: Path) -> None:
    """Every command that reads the run gives a result or one error."""
    run = shutil.copytree(trained_recipe.parent / "run", tmp_path / "run")
    RUNS[how](run)
    commands: list[list[str | Path]] = [
        ["report", run],
        ["merge", run, "--out", tmp_path / "merged"],
        ["generate", run, "--prompt", "a", "--max-new-tokens", "1"],
        ["train", trained_recipe, f"output={run}", "--resume"],
    ]
    outcomes = [qlora(*command) for command in commands]
    assert any(outcome.code for outcome in outcomes) or "metrics" in how
    for outcome in outcomes:
        assert outcome.code in (0, 1, 2), outcome.err
        assert "bug" not in outcome.err, outcome.err
        assert "Traceback" not in outcome.err
