"""Every command that loads the packed base uses its copy, with the same results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import make_base, make_rows

pytestmark = pytest.mark.slow

USED, KEPT = "the packed base of an earlier start is used", "the packed base is kept"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with `base.cache: true` and an empty cache."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    content = {
        "model": {"name": str(make_base(tmp_path / "base", "llama"))},
        "base": {"cache": True},
        "data": {"train": str(make_rows(tmp_path / "rows.jsonl")), "seq_len": 32},
        "train": {"steps": 2, "grad_accum": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "job.yaml").write_text(json.dumps(content))
    return tmp_path / "job.yaml"


def test_commands_use_the_copy(job: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    assert KEPT in qlora("train", job).err
    resumed = qlora("train", job, "--resume", "train.steps=3")
    assert USED in resumed.err, resumed.err
    unused = qlora("train", job, "--resume", "train.steps=4", "base.cache=false")
    assert unused.code == 0, unused.err
    assert USED not in unused.err
    assert KEPT not in unused.err
    assert USED in qlora("train", job, "--resume", "train.steps=5").err
    listed = qlora("cache", "list", "--json").json["entries"]
    assert [entry["description"] for entry in listed if entry["kind"] == "packed"] == [
        f"{tmp_path / 'base'} in nf4-nested for cpu"
    ]
    for command in (
        ("eval", run, "--data", tmp_path / "rows.jsonl"),
        ("generate", run, "--prompt", "abc", "--max-new-tokens", "5"),
        ("merge", run, "--out", out),
        ("verify", out, "--against", run),
    ):
        with_copy = qlora(*command, "--json")
        shutil.move(tmp_path / "cache", tmp_path / "away")
        if command[0] == "merge":
            out.rename(tmp_path / "first")
        without = qlora(*command, "--json")
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        shutil.move(tmp_path / "away", tmp_path / "cache")
        for outcome, has_copy in ((with_copy, True), (without, False)):
            assert outcome.code == 0, outcome.err
            assert (USED in outcome.err) == has_copy, (command, outcome.err)
        assert _results(with_copy.json) == _results(without.json)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "first")]
    assert weights[0] == weights[1]


def _results(content: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a command without its times."""
    return {key: value for key, value in content.items() if "second" not in key}
