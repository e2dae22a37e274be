"""`qlora sweep` on the command line, and the commands of docs/sweep.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.cli_checks import assert_refused
from tests.helpers.cli_helpers import qlora


@pytest.mark.slow
def test_a_sweep_and_its_extension(job_recipe: Path) -> None:
    outcome = qlora("sweep", job_recipe, "adapter.rank=1,2,3", "--random", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["runs"]) == len(outcome.json["table"]) == 2
    assert "run 2 of 2" in outcome.err
    folder = Path(outcome.json["folder"])
    assert Path(outcome.json["plot"]).is_file()
    more = ("--seeds", "1", "--resume", "--allow", "duplicates")
    again = qlora("sweep", job_recipe, "adapter.rank=1,2,3", "data.cache=false;true", *more)
    assert again.code == 0, again.err
    assert f"sweep: {folder}" in again.out
    assert "next: qlora report" in again.err


def test_wrong_arguments_are_refused_before_anything_is_written(job_recipe: Path) -> None:
    assert_refused(qlora("sweep", job_recipe), 2, "there is only one run")
    assert_refused(qlora("sweep", job_recipe, "adapter.rnk=1,2"), 2, "did you mean adapter.rank?")
    assert_refused(qlora("sweep", job_recipe, "adapter.rank=0,2"), 2, "must be an integer")
    assert not (job_recipe.parent / "run").exists()


@pytest.mark.slow
def test_the_commands_of_the_documentation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "sweep.md").read_text()
    (block,) = re.findall(r"^```\n(qlora sweep .*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "qlora"
        small = ["train.steps=1", "train.grad_accum=1", "data.eval=", "data.max_rows=2"]
        arguments = words[1:] + (small if "sweep" in words else [])
        outcome = qlora(*arguments)
        assert outcome.code == 0, outcome.err
    found = json.loads(Path("runs/starter/sweep.json").read_text())
    assert all(run["status"] == "done" for run in found["runs"])
