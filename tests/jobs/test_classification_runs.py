"""Runs of `task: classification`: metrics, resume, plan, merge, verify, eval, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qlora_cli.errors import DataError, Interrupted, RecipeError, UsageError
from qlora_cli.events import Silent
from qlora_cli.files.locate import read_config
from qlora_cli.jobs import classify, data, evaluate, merge, plan, train, verify
from qlora_cli.jobs.generate import Prompt
from qlora_cli.jobs.label_results import LabelEvalResult
from qlora_cli.jobs.labels import resolve_labels
from qlora_cli.memory.ledger import Ledger
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from tests.helpers.classifiers import (
    classification_recipe,
    make_classified_base,
    make_labelled_rows,
)
from tests.helpers.interrupted import train_run
from tests.helpers.observers import NoteRecorder
from tests.helpers.resumed_runs import STEPS, assert_same_run

pytestmark = pytest.mark.slow

TYPES = ("bert", "llama", "deberta-v2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_labelled_rows(folder / "rows.jsonl")
    make_labelled_rows(folder / "pairs.jsonl", pairs=True)
    for name in TYPES:
        make_classified_base(folder / name, name)
    return folder


def recipe(bases: Path, output: Path, model: str = "bert", **sections: Any) -> Recipe:
    """A run of five steps with dropout."""
    defaults = {"steps": STEPS, "grad_accum": 2, "lr": 1e-2, "keep_checkpoints": None}
    settings = {
        "adapter": {"dropout": 0.2},
        "train": defaults | sections.pop("train", {}),
        "data": {"seq_len": 64, **sections.pop("data", {})},
        **sections,
    }
    rows = bases / sections.get("rows", "rows.jsonl")
    settings.pop("rows", None)
    made = classification_recipe(bases / model, rows, **settings)
    return made.model_copy(update={"output": str(output)})


@pytest.fixture(scope="module", params=TYPES)
def finished(
    request: pytest.FixtureRequest, bases: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    return train_run(recipe(bases, tmp_path_factory.mktemp("runs") / "run", request.param))


def evaluations(run: RunFolder) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def test_a_run_has_metrics_and_labels(finished: RunFolder) -> None:
    before, after = evaluations(finished)
    assert {"accuracy", "f1", "matthews"} <= after.keys()
    assert after["eval_rows"] == 24
    assert after["eval_loss"] < before["eval_loss"]
    assert Run(finished.path).recipe.classification.names == ("high", "low")
    assert finished.read()["result"]["metrics"]["accuracy"] == after["accuracy"]


@pytest.mark.parametrize("model", TYPES)
def test_the_plan_equals_the_run(bases: Path, tmp_path: Path, model: str) -> None:
    """All micro-batches have one size here, which is the planned one."""
    rows = [{"text": letter * 12, "label": letter} for letter in "xyxyxyxy"]
    file = str(write(tmp_path / "rows.jsonl", *rows))
    files = {"train": file, "eval": file, "packing": False}
    run = train_run(recipe(bases, tmp_path / "run", model, data=files, train={"micro_batch": 2}))
    ledger = Ledger.from_dict(json.loads(run.memory_json.read_text()))
    assert ledger.measured_peak_bytes == pytest.approx(ledger.planned_peak_bytes, rel=0.01)


def test_the_head_trains_and_is_saved(finished: RunFolder) -> None:
    saved = load_file(finished.adapter / "adapter_model.safetensors")
    config = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    heads = [name for name in saved if "lora_" not in name]
    for path in config["modules_to_save"]:
        assert any(f".{path}." in name for name in heads), path
    assert all(saved[name].dtype == torch.float32 for name in heads)
    first = load_file(finished.checkpoint(STEPS) / "trained.safetensors")
    assert {name.removeprefix("base_model.model.") for name in heads} <= first.keys()


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, bases: Path, finished: RunFolder
) -> None:
    model = Path(finished.read()["recipe"]["model"]["name"]).name
    settings = recipe(bases, tmp_path / "stopped", model)
    with pytest.raises(Interrupted):
        train_run(settings, stop_after=2)
    torch.manual_seed(999)
    resumed = train_run(settings, resume=True)
    assert_same_run(resumed, finished)


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_a_run_is_merged_and_verified(finished: RunFolder, tmp_path: Path, base: Any) -> None:
    """transformers loads the folder with every tensor, and computes what was trained."""
    out = tmp_path / "merged"
    merge.run(finished.path, out=out, dtype="float32", base=base, observer=Silent())
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == {0: "high", 1: "low"}
    result = verify.run(out, against=finished.path, observer=Silent())
    if base == "original":
        assert result.max_logit_difference > 0
        return
    assert result.passed, result.faults
    assert result.greedy_tokens is None
    trained = classify.open_classifier(str(finished.path), Silent()).answer(Prompt("hhhabc"))
    own = classify.open_classifier(str(out), Silent()).answer(Prompt("hhhabc"))
    assert own.probabilities == pytest.approx(trained.probabilities, abs=1e-4)
    ids = AutoTokenizer.from_pretrained(out)("hhhabc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits.softmax(dim=1)[0].tolist()
    found = [own.probabilities[name] for name in ("high", "low")]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model", TYPES)
def test_the_packed_copy_of_a_classifier_is_not_called_damaged(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """The copy has no head. The models that merging compares read it from the run."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    run = train_run(recipe(bases, tmp_path / "run", model, base={"bits": 4, "cache": True}))
    notes = NoteRecorder()
    out = tmp_path / "merged"
    merge.run(run.path, out=out, dtype="float32", base="auto", observer=notes)
    assert verify.run(out, against=run.path, observer=notes).passed
    assert any("the packed base of an earlier start is used" in note for note in notes.notes)
    assert not any("damaged" in note for note in notes.notes), notes.notes
    assert not list((tmp_path / "cache").glob("*/*-damaged"))


def test_verification_finds_a_changed_head(finished: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge.run(finished.path, out=out, dtype=None, base="dequantized", observer=Silent())
    file = out / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith(("classifier", "score")))
    save_file(tensors | {name: tensors[name] * -3}, file, {"format": "pt"})
    result = verify.run(out, against=finished.path, observer=Silent())
    assert not result.passed
    assert any(name in fault for fault in result.faults)
    assert any("the predictions differ" in fault for fault in result.faults)


def test_eval_gives_what_the_run_measured(finished: RunFolder, bases: Path) -> None:
    rows = str(bases / "rows.jsonl")
    result = evaluate.run(str(finished.path), data=rows, observer=Silent())
    assert isinstance(result, LabelEvalResult)
    last = evaluations(finished)[-1]
    assert result.loss == pytest.approx(last["eval_loss"], rel=1e-4)
    assert result.metrics["matthews"] == last["matthews"]


def test_a_metric_chooses_the_best_step(bases: Path, tmp_path: Path) -> None:
    changes = {"keep_best": "matthews", "eval_every": 1, "lr": 0.05, "steps": 8}
    run = train_run(recipe(bases, tmp_path / "run", train=changes))
    lines = [line for line in evaluations(run) if line["step"] > 0]
    best = max(lines, key=lambda line: line["matthews"])
    assert run.read()["result"]["best_step"] == best["step"]


def test_rows_of_two_texts(bases: Path, tmp_path: Path) -> None:
    run = train_run(recipe(bases, tmp_path / "run", rows="pairs.jsonl"))
    assert Run(run.path).recipe.classification.pairs is True
    opened = classify.open_classifier(str(run.path), Silent())
    assert set(opened.answer(Prompt("abc", second="cba")).probabilities) == {"high", "low"}
    with pytest.raises(UsageError, match="pairs of texts"):
        opened.answer(Prompt("abc"))


def test_a_regression(bases: Path, tmp_path: Path) -> None:
    rows = tmp_path / "scores.jsonl"
    lines = [{"text": "a" * (i % 7 + 1), "label": (i % 7) / 2} for i in range(21)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = recipe(bases, tmp_path / "run", data={"train": str(rows), "eval": str(rows)})
    run = train_run(settings)
    last = evaluations(run)[-1]
    assert {"pearson", "spearman"} <= last.keys()
    out = tmp_path / "merged"
    merge.run(run.path, out=out, dtype=None, base="dequantized", observer=Silent())
    assert verify.run(out, against=run.path, observer=Silent()).passed
    config = read_config(out / "config.json")
    assert (config.num_labels, config.problem_type) == (1, "regression")
    answers = [
        classify.open_classifier(str(where), Silent()).answer(Prompt("aaa")).value
        for where in (run.path, out)
    ]
    assert answers[0] == pytest.approx(answers[1], abs=1e-2)


def labels_of(bases: Path, rows: Path, **sections: Any) -> Recipe:
    settings = recipe(bases, rows.parent / "run", data={"train": str(rows)}, **sections)
    return resolve_labels(settings, read_config(bases / "bert" / "config.json"))[0]


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_labels_are_taken_from_the_rows(bases: Path, tmp_path: Path) -> None:
    numbers = write(tmp_path / "a.jsonl", *({"text": "a", "label": n} for n in (2, 10, 2, 0)))
    found = labels_of(bases, numbers, classification={"class_weights": "balanced"})
    assert found.classification.names == ("0", "2", "10")
    assert found.classification.class_weights == pytest.approx(
        {"0": 4 / 3, "2": 2 / 3, "10": 4 / 3}
    )
    glue = write(
        tmp_path / "b.jsonl",
        {"sentence1": "a", "sentence2": "b", "label": "entailment"},
        {"sentence1": "a", "sentence2": "c", "label": "not_entailment"},
    )
    found = labels_of(bases, glue)
    assert found.data.columns == {"text": "sentence1", "text_pair": "sentence2"}
    assert found.classification.pairs is True


@pytest.mark.parametrize(
    ("rows", "sections", "message"),
    [
        ([{"text": "a", "label": "x"}] * 2, {}, "all 2 rows have the label 'x'"),
        ([{"text": "a"}] * 2, {}, "no row has a 'label'"),
        (
            [{"text": "a", "label": 0.5}, {"text": "b", "label": 1}],
            {"train": {"keep_best": "accuracy"}},
            "accuracy is no metric of regression; use pearson, spearman",
        ),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            {"classification": {"class_weights": {"x": 1.0}}},
            "needs a number for each label and no other; check y",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_one_error(
    bases: Path, tmp_path: Path, rows: list[Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        labels_of(bases, write(tmp_path / "rows.jsonl", *rows), **sections)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "c", "label": "z"}, "unknown label 'z'; the labels are x, y"),
        ({"text": "c", "label": "x", "text_pair": "d"}, "which other rows do not have"),
        ({"text": "c"}, "no field 'label'"),
        ({"text": " ", "label": "x"}, "'text' is empty"),
    ],
)
def test_a_faulty_held_out_row_is_named(
    bases: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    good = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    held_out = write(tmp_path / "dev.jsonl", good[0], fields)
    files = {"train": str(write(tmp_path / "train.jsonl", *good)), "eval": str(held_out)}
    with pytest.raises(DataError, match="1 of 2 rows") as caught:
        train_run(recipe(bases, tmp_path / "run", data=files))
    assert message in str(caught.value)
    assert "dev.jsonl:2" in str(caught.value)


def test_long_rows_keep_their_label_and_their_last_token(bases: Path, tmp_path: Path) -> None:
    rows = [{"text": letter * 40, "label": letter} for letter in "xyxy"]
    file = write(tmp_path / "rows.jsonl", *rows)
    files = {"train": str(file), "eval": str(file), "seq_len": 16}
    result = data.run(recipe(bases, tmp_path / "run", data=files), show=1)
    assert result.shown[0].origin == "rows.jsonl:1 label x"
    assert result.rows == 4
    assert result.longest_row == 16
    assert result.long_rows["policies"] == ["truncate"]


def test_padding_is_chosen_planned_and_reported(bases: Path, tmp_path: Path) -> None:
    settings = recipe(bases, tmp_path / "run", "deberta-v2", train={"micro_batch": 4})
    result = plan.run(settings, device_profile=None, fit=False, compare=False)
    assert any("data.packing = False" in note for note in result.notes)
    assert any(note.startswith("padding: ") for note in result.notes)
    notes = NoteRecorder()
    train.run(settings, recipe_path=None, resume=False, observer=notes)
    assert any(note.startswith("padding: ") for note in notes.notes)
    written = settings.model_copy(
        update={"data": type(settings.data)(train=settings.data.train, packing=True)}
    )
    with pytest.raises(RecipeError, match="cannot separate rows"):
        plan.run(written, device_profile=None, fit=False, compare=False)
