"""The base of a classifier: packed copies without the head, heads in checkpoints, shared blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from tests.helpers.classifiers import (
    classification_recipe,
    encoder_config,
    make_encoder,
    make_labelled_rows,
)
from tests.helpers.interrupted import train_run

pytestmark = pytest.mark.slow


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return make_labelled_rows(tmp_path / "rows.jsonl")


def recipe(model: Path, rows: Path, output: Path, **sections: Any) -> Recipe:
    settings = {"steps": 2, "grad_accum": 1, **sections.pop("train", {})}
    data = {"seq_len": 64, **sections.pop("data", {})}
    made = classification_recipe(model, rows, train=settings, data=data, **sections)
    return made.model_copy(update={"output": str(output)})


def adapter_of(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_a_packed_copy_contains_no_head(tmp_path: Path, rows: Path) -> None:
    """A run from a copy that another run with another head wrote equals one without a copy."""
    base = make_encoder(tmp_path / "bert")

    def run(name: str, seed: int, cache: bool) -> RunFolder:
        changes = {"base": {"cache": cache}, "train": {"seed": seed}}
        return train_run(recipe(base, rows, tmp_path / name, **changes))

    first, copied, plain = (
        run(name, seed, cache)
        for name, seed, cache in (("first", 1, True), ("copied", 2, True), ("plain", 2, False))
    )
    assert adapter_of(copied) == adapter_of(plain)
    assert adapter_of(copied) != adapter_of(first)


def test_a_head_in_the_checkpoint_is_where_training_begins(tmp_path: Path, rows: Path) -> None:
    """A head of another number of labels is replaced by a new one."""
    for number, is_used in ((2, True), (3, False)):
        base = make_encoder(tmp_path / f"bert-{number}")
        torch.manual_seed(number)
        config = encoder_config("bert", num_labels=number)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(base)
        run = train_run(recipe(base, rows, tmp_path / f"run-{number}", train={"lr": 1e-9}))
        saved = load_file(run.adapter / "adapter_model.safetensors")
        found = saved["base_model.model.classifier.weight"]
        own = model.classifier.weight.detach()
        assert found.shape == (2, 64)
        assert (found.shape == own.shape and torch.allclose(found, own, atol=1e-6)) is is_used


def test_blocks_that_are_computed_several_times_are_planned(tmp_path: Path) -> None:
    """ALBERT computes one block in each of its six layers."""
    base = make_encoder(tmp_path / "albert", "albert", num_hidden_layers=6)
    file = tmp_path / "equal.jsonl"
    equal = [{"text": letter * 12, "label": letter} for letter in "xyxyxyxy"]
    file.write_text("".join(json.dumps(row) + "\n" for row in equal))
    data = {"train": str(file), "eval": str(file), "packing": False}
    for checkpointing in (True, False):
        changes = {"micro_batch": 2, "grad_accum": 2, "activation_checkpointing": checkpointing}
        out = tmp_path / f"run-{checkpointing}"
        run = train_run(recipe(base, file, out, data=data, train=changes))
        ledger = json.loads(run.memory_json.read_text())
        planned, measured = ledger["planned_peak_bytes"], ledger["measured_peak_bytes"]
        assert measured == pytest.approx(planned, rel=0.01)
