"""The first run of docs/preference.md works as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli_helpers import qlora
from tests.helpers.documents import block

pytestmark = pytest.mark.slow


def test_the_first_run_learns_the_preference(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "preference.md").read_text()
    exec(block(text, "python"), {})
    Path("dpo.yaml").write_text(block(text, "yaml"))
    shown = qlora("data", "dpo.yaml", "--show", "1")
    assert shown.code == 0, shown.err
    assert "pairs.jsonl" in shown.out
    assert "rejected" in shown.out
    outcome = qlora("train", "dpo.yaml", "train.epochs=2", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["eval_loss_before"] == pytest.approx(0.6931, abs=1e-3)
    assert outcome.json["eval_loss"] < 0.2
    page = Path("runs/dpo/report.html").read_text()
    assert all(f">{title}<" in page for title in ("Loss", "Accuracy", "Reward margin", "Speed"))
    evaluated = qlora("eval", "runs/dpo", "--data", "pairs.jsonl", "--json")
    assert evaluated.json["accuracy"] == 1.0
    assert evaluated.json["pairs"] == 120
