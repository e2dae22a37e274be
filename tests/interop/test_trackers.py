"""Trackers without a server: what their own files contain after a run.

The runs are in processes of their own, because trackers start threads and services that live until
the process ends. TensorBoard is tested in tests/train/test_trackers.py.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import make_base, make_rows
from tests.helpers.shared_data import ROOT

pytestmark = pytest.mark.slow

STEPS = 3
RECIPE = """\
model: {{name: {folder}/base}}
adapter: {{rank: 2}}
data: {{train: {folder}/rows.jsonl, eval: {folder}/rows.jsonl, seq_len: 32}}
train: {{steps: 3, grad_accum: 1, eval_every: 1, log_to: [{tracker}]}}
output: {folder}/mine
"""
FIGURES = {"loss", "lr", "grad_norm", "peak_bytes", "eval_loss", "measured_peak_bytes"}
"""Some of the figures that every tracker receives."""


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


def train(tracker: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train a small recipe that logs to the tracker; all files of the process are in `folder`."""
    make_base(folder / "base", "llama", spread=0.1)
    make_rows(folder / "rows.jsonl", num=4)
    (folder / "mine.yaml").write_text(RECIPE.format(folder=folder, tracker=tracker))
    home = {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "qlora_cli", "train", "mine.yaml"],
        cwd=folder,
        env={**os.environ, **home, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )


def assert_succeeded(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert "failed and gets nothing more" not in result.stderr


def assert_is_the_recipe(settings: Mapping[str, Any]) -> None:
    assert settings["adapter.rank"] in (2, "2")
    assert settings["train.steps"] in (STEPS, str(STEPS))
    assert settings["adapter.targets"] == "['q', 'v']"


def wandb_records(file: Path) -> list[Any]:
    """Return the records of a small .wandb file: a header of 7 bytes, and 7 before each record."""
    from wandb.proto import wandb_internal_pb2

    content, records, at = file.read_bytes(), [], 7
    while at < len(content):
        _, length, _ = struct.unpack_from("<IHB", content, at)
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[at + 7 : at + 7 + length])
        records.append(record)
        at += 7 + length
    return records


@needs("wandb")
def test_wandb_without_a_server_stores_the_recipe_and_the_figures(tmp_path: Path) -> None:
    assert_succeeded(train("wandb", tmp_path, WANDB_MODE="offline"))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    config = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in records
        for item in record.config.update
    }
    assert_is_the_recipe(config)
    figures = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in part.history.item}
        for part in records
        if part.HasField("history")
    ]
    assert [line["step"] for line in figures] == [0, 1, 2, 3]
    assert {name for line in figures for name in line} >= FIGURES
    assert next(part.run.project for part in records if part.HasField("run")) == "qlora"


@needs("wandb")
def test_wandb_without_a_login_is_an_error_before_the_run(tmp_path: Path) -> None:
    result = train("wandb", tmp_path, WANDB_MODE="online", WANDB_API_KEY="")
    assert result.returncode == 2
    assert "wandb cannot start: " in result.stderr
    assert not (tmp_path / "mine").exists()


@needs("mlflow")
def test_mlflow_in_a_folder_stores_the_recipe_and_the_figures(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    # Newer versions of MLflow require the second variable for a store without a database.
    assert_succeeded(
        train("mlflow", tmp_path, MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true")
    )
    (parameters,) = (tmp_path / "store").glob("*/*/params")
    assert_is_the_recipe({file.name: file.read_text() for file in parameters.iterdir()})
    metrics = {file.name: file.read_text() for file in (parameters.parent / "metrics").iterdir()}
    assert metrics.keys() >= FIGURES
    assert [line.split()[-1] for line in metrics["eval_loss"].splitlines()] == ["0", "1", "2", "3"]


@needs("trackio")
def test_trackio_stores_the_recipe_and_the_figures(tmp_path: Path) -> None:
    assert_succeeded(train("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "store")))
    with sqlite3.connect(tmp_path / "store" / "qlora.db") as store:
        ((config,),) = store.execute("select config from configs").fetchall()
        lines = store.execute("select step, metrics from metrics order by id").fetchall()
    store.close()
    assert_is_the_recipe(json.loads(config))
    assert {step for step, _ in lines} == {0, 1, 2, 3}
    assert {name for _, line in lines for name in json.loads(line)} >= FIGURES
