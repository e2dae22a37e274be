"""run.py of tools/paper measures small experiments, and docs/paper.md shows the real figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import classification_cells
import paper_data
import pytest
import run as paper_run
import tables
import torch
from experiments import EXPERIMENTS
from generation_cells import corpus_scores, last_number
from houlsby import SequentialAdapters
from memory_cells import LARGE_SHAPE, SHAPE
from paper_cells import Workspace
from torch import nn
from transformers import GPT2Config

from qlora_cli.recipe.load import load_recipe
from tests.helpers.classifiers import make_encoder
from tests.helpers.runs import make_base

NAMES = [experiment.name for experiment in EXPERIMENTS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the forms of the real files, and the shapes."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("glue/sst2_sentences", "glue/RTE", "nlg/e2e", "instruct/alpaca", "configs"):
        (folder / name).mkdir(parents=True)
    texts = [f"{'good' if row % 2 else 'bad'} film {row}" for row in range(20)]
    for part in ("train", "dev", "test"):
        lines = [f"{text}\t{row % 2}" for row, text in enumerate(texts)]
        (folder / f"glue/sst2_sentences/{part}.tsv").write_text("\n".join(lines) + "\n")
        pairs = [
            f"{row}\t{text}\ta film\t{('', 'not_')[row % 2]}entailment"
            for row, text in enumerate(texts)
        ]
        header = "index\tsentence1\tsentence2\tlabel"
        (folder / f"glue/RTE/{part}.tsv").write_text("\n".join([header, *pairs]) + "\n")
    for part in ("train", "valid", "test"):
        lines = [f"name : {row // 2}||There is a {row % 2} {row // 2} ." for row in range(24)]
        (folder / f"nlg/e2e/{part}.txt").write_text("\n".join(lines) + "\n")
    rows = [json.dumps({"instruction": f"Add {n}", "input": "", "output": "x"}) for n in range(90)]
    (folder / "instruct/alpaca/alpaca_data_5k.jsonl").write_text("\n".join(rows) + "\n")
    for name in (SHAPE, LARGE_SHAPE):
        (folder / f"configs/{name}.json").write_text(json.dumps(GPT2Config().to_dict()))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_encoder(folder / "minilm")
    make_base(folder / "books-gpt2", "gpt2")
    make_base(folder / "smollm2", "llama", max_position_embeddings=128)
    return folder


class Runner:
    """Runs the tool on small data, in folders of a test."""

    def __init__(self, folder: Path, data: Path, models: Path) -> None:
        self.out, self.work = folder / "out", folder / "work"
        self._places = ["--data", str(data), "--models", str(models)]

    def __call__(self, *words: str) -> int:
        folders = ["--out", str(self.out), "--work", str(self.work)]
        return paper_run.main(["--small", *folders, *self._places, *words])

    def cells(self, name: str) -> list[dict[str, Any]]:
        return list(json.loads((self.out / f"{name}.json").read_text())["cells"])


@pytest.fixture
def runner(tmp_path: Path, data: Path, models: Path) -> Runner:
    return Runner(tmp_path, data, models)


CHECKS = {
    "tasks": lambda r: r["answers_unchanged"] == r["distinct_answers"] == r["tasks"] == 3,
    "latency": lambda r: r["token"]["adapters in sequence / base"]["num"] == 2,
    "memory": lambda r: abs(r["measured_peak_bytes"] / r["planned_peak_bytes"] - 1) < 0.01,
    "sst2": lambda r: 0 <= r["test_accuracy"] <= 1 and r["test_rows"] == 16 and r["steps"] == 2,
    "matrices": lambda r: [line["status"] for line in r["table"]] == ["done"] * 2,
    "instruct": lambda r: r["questions"] == 16 and 0 <= r["exact_match"] <= 1,
    "e2e": lambda r: r["texts"] == 12 and r["beams"] == 2 and 0 <= r["bleu"] <= 100,
    "rte": lambda r: 0 <= r["dev_accuracy"] <= 1 and "test_accuracy" not in r,
}
"""Experiment -> what holds for the result of each cell of its small version."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_experiment_has_a_smaller_version(name: str, runner: Runner) -> None:
    assert runner("--only", name) == 0
    experiment = next(e for e in EXPERIMENTS if e.name == name)
    cells = runner.cells(name)
    assert [(c["name"], c["seed"]) for c in cells] == [(c.name, c.seed) for c in experiment.small]
    for cell in cells:
        assert CHECKS[name](cell["result"]), cell["result"]
        assert cell["where"]["versions"]["torch"] == torch.__version__
        assert str(runner.work) not in json.dumps(cell), "commands are relative to --work"
    assert "not measured" in tables.TABLES[name](experiment, [])


@pytest.mark.slow
def test_a_measured_cell_is_not_repeated_and_a_stopped_one_is_resumed(
    runner: Runner, data: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner("--only", "rte", "--budget", "0") == 0
    assert "stopped: about" in capsys.readouterr().err
    assert not (runner.out / "rte.json").exists()
    space = Workspace(runner.work, small=True)
    trained = space.train("rte", "runs/rte-lora-0", "train.seed=0", *classification_cells._SMALL)
    assert runner("--only", "rte") == 0
    (cell,) = runner.cells("rte")
    assert cell["resumed"]
    assert cell["result"]["dev_accuracy"] == trained["metrics"]["accuracy"]
    assert runner("--only", "rte") == 0
    assert runner.cells("rte") == [cell]
    changed = cell | {"recipes": {"recipes/paper/rte.yaml": "another recipe"}}
    (runner.out / "rte.json").write_text(json.dumps({"cells": [changed]}))
    assert runner("--only", "rte") == 0
    (again,) = runner.cells("rte")
    assert again["recipes"] == cell["recipes"]
    assert not again["resumed"]
    assert again["result"] == cell["result"]


def test_a_cell_with_other_settings_is_another_measurement(tmp_path: Path) -> None:
    experiment = next(e for e in EXPERIMENTS if e.name == "tasks")
    report = paper_run.Report(tmp_path / "tasks.json", experiment)
    cell = experiment.cells[0]
    entry = {"name": cell.name, "seed": 0, "settings": list(cell.settings), "recipes": {}}
    report.add(cell, entry)
    assert report.measured(cell) == entry
    other = replace(cell, settings=("tasks=2", "rounds=2"))
    assert report.measured(other) is None
    report.add(other, entry | {"settings": list(other.settings)})
    assert report.measured(cell) is None
    assert len(paper_run.Report(report.file, experiment).content["cells"]) == 1


def test_what_is_missing_is_reported_and_the_others_are_measured(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = Runner(tmp_path, data, tmp_path / "nothing")
    assert runner("--only", "tasks", "rte") == 1
    assert "rte: not measured: there is no model minilm: name" in capsys.readouterr().err
    assert runner.cells("tasks")
    with pytest.raises(SystemExit, match="--small: name another folder"):
        paper_run.main(["--small"])


def test_another_version_is_reported(runner: Runner) -> None:
    where = paper_run.where()
    assert paper_run.note_versions({"where": where}) == ""
    older = where | {"versions": where["versions"] | {"torch": "1.0"}}
    assert paper_run.note_versions({"where": older}) == (
        f"; measured with torch 1.0, now {torch.__version__}"
    )


def test_the_page_has_the_figures(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "paper.md").read_text()
    assert tables.fill(page) == page
    assert tables.fill(page, tmp_path) != page, "another folder has no figures"
    with pytest.raises(ValueError, match="exactly once"):
        tables.fill(page.replace("<!-- /paper:sst2 -->", ""))


def test_adapters_in_sequence_change_nothing_until_they_are_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rows = torch.randn(3, 4)
    plain = model(rows)
    adapters = SequentialAdapters([model[0]], 4, 2)
    assert adapters.num_parameters() == 2 * 4 * 2 + 4 + 2
    adapters.insert()
    assert torch.equal(model(rows), plain)
    nn.init.ones_(adapters.layers[0].up.bias)
    assert torch.equal(model(rows), model[1](nn.Linear.forward(model[0], rows) + 1))
    adapters.remove()
    assert torch.equal(model(rows), plain)


def test_scores_of_equal_texts_are_perfect_and_each_reference_counts() -> None:
    texts = ["the mill is a cheap pub near the river", "a coffee shop in the city centre"]
    references = [["other words", texts[0]], [texts[1]]]
    assert corpus_scores(texts, references) == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    assert corpus_scores(texts[::-1], references)["bleu"] < 50
    assert [last_number(text) for text in ("#### 12", "3 + 4 is 7.", "none")] == [12, 7, None]


def test_a_separator_inside_a_text_is_no_line_break(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("one\u0085two\nthree\n", encoding="utf-8")
    assert paper_data._lines(file) == ["one\u0085two", "three"]


def test_every_recipe_is_valid_and_belongs_to_an_experiment(root: Path) -> None:
    files = sorted((root / "recipes" / "paper").glob("*.yaml"))
    assert [file.stem for file in files] == ["e2e", "gpt3", "instruct", "memory", "rte", "sst2"]
    for file in files:
        assert load_recipe(file).output == f"runs/{file.stem}"
