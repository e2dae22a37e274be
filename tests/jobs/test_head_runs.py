"""Runs of `adapter.method: head`: the head trains alone, and PEFT and transformers read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qlora_cli.errors import Interrupted
from qlora_cli.events import Silent
from qlora_cli.jobs import classify, merge, plan, verify
from qlora_cli.jobs.generate import Prompt
from qlora_cli.memory.ledger import Ledger
from qlora_cli.models.attach import load_adapter
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from tests.helpers.classifiers import (
    classification_recipe,
    make_classified_base,
    make_labelled_rows,
)
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import STEPS, assert_same_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

HEAD = {"method": "head"}
TYPES = ("bert", "llama")
FILE = "adapter_model.safetensors"
TEXT = "hhhabc"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_labelled_rows(folder / "rows.jsonl")
    for name in TYPES:
        file = make_classified_base(folder / name, name) / "model.safetensors"
        # Values of 16 bit, so that a 16-bit base is the one in the file.
        rounded = {key: value.bfloat16().float() for key, value in load_file(file).items()}
        save_file(rounded, file, metadata={"format": "pt"})
    return folder


def recipe(bases: Path, output: Path, model: str = "bert", **sections: Any) -> Recipe:
    train = {"steps": STEPS, "grad_accum": 2, "lr": 1e-2, **sections.pop("train", {})}
    data = {"seq_len": 64, **sections.pop("data", {})}
    settings: dict[str, Any] = {"adapter": HEAD, "train": train, "data": data, **sections}
    made = classification_recipe(bases / model, bases / "rows.jsonl", **settings)
    return made.model_copy(update={"output": str(output)})


@pytest.fixture(scope="module", params=TYPES)
def finished(
    request: pytest.FixtureRequest, bases: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train_run(recipe(bases, folder, request.param, base={"bits": 16}))


def base_of(run: RunFolder) -> Path:
    return Path(run.read()["base_folder"])


def test_the_first_step_trains_the_head_as_lora_does(bases: Path, tmp_path: Path) -> None:
    """B is 0 in the first step, so both models and the gradients of their heads are equal."""
    first = {"train": {"steps": 1, "max_grad_norm": None}}
    alone, lora = (
        load_file(train_run(recipe(bases, tmp_path / name, **first, **own)).adapter / FILE)
        for name, own in (("head", {}), ("lora", {"adapter": {"targets": "all"}}))
    )
    assert alone
    assert alone.keys() == {name for name in lora if "lora_" not in name}
    for name, tensor in alone.items():
        assert torch.equal(tensor, lora[name]), name


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_equals_the_run(bases: Path, tmp_path: Path, checkpointing: bool) -> None:
    rows = [{"text": letter * 12, "label": letter} for letter in "xyxyxyxy"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(file), "eval": str(file), "packing": False}
    train = {"micro_batch": 2, "activation_checkpointing": checkpointing}
    settings = recipe(bases, tmp_path / "run", data=files, train=train)
    run = train_run(settings)
    ledger = Ledger.from_dict(json.loads(run.memory_json.read_text()))
    assert ledger.measured_peak_bytes == pytest.approx(ledger.planned_peak_bytes, rel=0.01)
    planned = plan.run(settings, device_profile=None, fit=False, compare=False)
    saved = load_file(run.adapter / FILE)
    assert planned.trainable_parameters == sum(tensor.numel() for tensor in saved.values())


def test_a_resumed_run_equals_an_uninterrupted_one(bases: Path, tmp_path: Path) -> None:
    uninterrupted = train_run(recipe(bases, tmp_path / "uninterrupted"))
    settings = recipe(bases, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train_run(settings, stop_after=2)
    torch.manual_seed(999)
    assert_same_run(train_run(settings, resume=True), uninterrupted)


def class_logits(model: Any, folder: Path) -> Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits[0]
    return logits


def test_peft_and_the_merged_model_compute_what_was_trained(
    finished: RunFolder, tmp_path: Path
) -> None:
    out, base = tmp_path / "merged", base_of(finished)
    merge.run(finished.path, out=out, dtype="float32", base="original", observer=Silent())
    result = verify.run(out, against=finished.path, observer=Silent())
    assert result.passed, result.faults
    merged = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    tensors, stored = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    heads = {name.removeprefix("base_model.model.") for name in load_file(finished.adapter / FILE)}
    kept = [
        (tensors[name], tensor)
        for file, tensor in stored.items()
        for name in tensors
        if name.endswith(file) and name not in heads
    ]
    assert kept
    assert all(torch.equal(found, expected.float()) for found, expected in kept)
    plain = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=2
    )
    with_adapter = PeftModel.from_pretrained(plain, finished.adapter)
    expected = class_logits(merged, out)
    torch.testing.assert_close(class_logits(with_adapter, out), expected, rtol=1e-5, atol=1e-5)
    own = classify.open_classifier(str(finished.path), Silent()).answer(Prompt(TEXT))
    found = [own.probabilities[name] for name in ("high", "low")]
    assert found == pytest.approx(expected.softmax(0).tolist(), abs=1e-5)


def test_ours_reads_a_head_that_peft_wrote(bases: Path, tmp_path: Path) -> None:
    base = bases / "llama"
    names = {"target_modules": "dummy-target-modules", "modules_to_save": ["score"]}
    torch.manual_seed(5)
    plain = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=2
    )
    get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", **names)).save_pretrained(tmp_path)
    run = train_run(recipe(bases, tmp_path / "run", "llama", base={"bits": 16}))
    opened = classify.open_classifier(str(run.path), Silent())
    load_adapter(opened.opened.loaded, tmp_path)
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = plain.eval()(input_ids=ids).logits[0]
    answer = opened.answer(Prompt(TEXT)).probabilities
    found = [answer[name] for name in ("high", "low")]
    assert found == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
    own = json.loads((run.adapter / "adapter_config.json").read_text())
    peft = json.loads((tmp_path / "adapter_config.json").read_text())
    assert own["target_modules"] == peft["target_modules"]
    assert set(own["modules_to_save"]) <= set(peft["modules_to_save"])
