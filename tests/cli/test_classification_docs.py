"""The first run of docs/classification.md works as it is written; `generate` on classifiers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.classifiers import make_encoder, make_labelled_rows
from tests.helpers.cli_helpers import qlora
from tests.helpers.documents import block

pytestmark = pytest.mark.slow


def test_the_first_run_learns_the_labels(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "classification.md").read_text()
    exec(block(text, "python"), {})
    Path("questions.yaml").write_text(block(text, "yaml"))
    shown = qlora("data", "questions.yaml", "--show", "1")
    assert shown.code == 0, shown.err
    assert re.search(r"questions\.jsonl:\d+ label (price|stock|return)", shown.out)
    outcome = qlora("train", "questions.yaml", "train.epochs=4", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["metrics"]["accuracy"] >= 0.9
    page = Path("runs/questions/report.html").read_text()
    assert all(f">{title}<" in page for title in ("Loss", "Accuracy", "Speed"))
    asked = "How much is the sofa?"
    answered = qlora("generate", "runs/questions", "--prompt", asked)
    assert answered.out.splitlines()[0] == "price"
    assert re.search(r"\d+\.\d\d%  stock", answered.out)
    refused = qlora("chat", "runs/questions")
    assert refused.code == 2
    assert "is a classifier, which generates no text" in refused.err


def test_pairs_files_and_options_of_generate(tmp_path: Path) -> None:
    base = make_encoder(tmp_path / "bert")
    rows = make_labelled_rows(tmp_path / "pairs.jsonl", pairs=True)
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text(
        f"model: {{name: {base}}}\ntask: classification\ndata: {{train: {rows}, seq_len: 64}}\n"
        f"train: {{steps: 1}}\noutput: {tmp_path / 'run'}\n"
    )
    assert qlora("train", recipe, "--json").code == 0
    run = tmp_path / "run"
    found = qlora("generate", run, "--prompt", "hhh", "--pair", "lll", "--json").json
    assert found["text_pair"] == "lll"
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
    missing = qlora("generate", run, "--prompt", "hhh")
    assert missing.code == 2
    assert "add the second text with --pair" in missing.err
    refused = qlora("generate", run, "--prompt", "hhh", "--pair", "l", "--temperature", "0.5")
    assert "--temperature: it does not apply to a classifier" in refused.err
    unused = qlora("generate", run, "--prompts", rows, "--pair", "lll")
    assert "--pair: it needs --prompt" in unused.err
    out = tmp_path / "answers.jsonl"
    written = qlora("generate", run, "--prompts", rows, "--out", out)
    assert written.code == 0, written.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 24
    assert lines[0].keys() == {"prompt", "text_pair", "text", "label", "probabilities"}
    assert qlora("merge", run, "--out", tmp_path / "merged", "--gguf", "f16").code == 2
