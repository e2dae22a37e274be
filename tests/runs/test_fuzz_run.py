"""Damaged and absurd files of a run: only our own errors come out of what reads and shows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from rich.console import Console

from qlora_cli.events import Silent
from qlora_cli.jobs import report
from qlora_cli.jobs.run_lifecycle import finished_result
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_evaluations, read_steps, remove_lines_after
from qlora_cli.runs.run import Run
from qlora_cli.ui import report as page
from qlora_cli.ui import tables
from tests.helpers.fuzz import changed_json, changed_lines, fuzzed, only_own_errors, write
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import recipe_of
from tests.helpers.runs import make_base, make_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl", num=17, length=12)
    make_base(folder / "llama", "llama")
    return train_run(recipe_of(folder, folder / "run", train={"steps": 3, "checkpoint_every": 1}))


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """Return a copy of the run that may be changed."""
    return RunFolder(shutil.copytree(trained.path, tmp_path / "run"))


def show(run: RunFolder) -> None:
    """Make the report of a run in every form."""
    result = report.run(run.path)
    json.dumps(result.to_dict())
    with Path("/dev/null").open("w") as stream:
        Console(file=stream, width=100).print(tables.report(result))


def use(run: RunFolder, description: dict[str, Any]) -> None:
    """Read everything that the commands read from a run.

    description: the run.json of a job that would resume it.
    """
    opened = Run(run.path)
    assert isinstance(opened.recipe, Recipe)
    assert opened.base_folder.is_dir()
    opened.describe_weights()
    opened.exported_damage()
    assert opened.adapter_file
    finished_result(opened, description, Silent())


def test_the_run_is_valid(run: RunFolder) -> None:
    show(run)
    use(run, run.read())


def test_run_json(run: RunFolder) -> None:
    valid = run.read()

    @fuzzed()
    @given(changed_json(valid, {**valid, "status": "running"}))
    def check(content: bytes) -> None:
        write(run.run_json, content)
        with only_own_errors():
            use(run, valid)
        with only_own_errors():
            show(run)

    check()


def test_metrics(run: RunFolder) -> None:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]

    @fuzzed()
    @given(changed_lines(*lines))
    def check(content: bytes) -> None:
        write(run.metrics, content)
        with only_own_errors():
            show(run)
        with only_own_errors():
            Run(run.path).describe_weights()
            read_steps(run.metrics)
            remove_lines_after(run.metrics, 2)
            assert len(read_evaluations(run.metrics)) <= 4

    check()


def _short(trace: dict[str, Any]) -> dict[str, Any]:
    """Return the first moments of a trace."""
    rows = {name: row[:3] for name, row in trace["bytes"].items()}
    return {**trace, "seconds": trace["seconds"][:3], "bytes": rows, "marks": trace["marks"][:2]}


@pytest.mark.parametrize("name", ["memory.json", "timeline.json"])
def test_memory(run: RunFolder, name: str) -> None:
    valid: Any = json.loads((run.path / name).read_text())
    if name == "timeline.json":
        valid["stretches"] = [_short(trace) for trace in valid["stretches"][:2]]

    @fuzzed()
    @given(changed_json(valid))
    def check(content: bytes) -> None:
        write(run.path / name, content)
        with only_own_errors():
            show(run)

    check()


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # Very large sizes.
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "memory.json", "timeline.json"])
def test_pages(run: RunFolder, name: str) -> None:
    """The page with its figures takes longer, so that fewer cases are tried."""
    file = run.path / name
    whole = file.read_text().splitlines() if name == "metrics.jsonl" else [file.read_text()]
    valid = [json.loads(text) for text in whole]
    if name == "timeline.json":
        valid[0]["stretches"] = [_short(trace) for trace in valid[0]["stretches"]]

    @fuzzed(0.1)
    @given(changed_lines(*valid) if name == "metrics.jsonl" else changed_json(*valid))
    def check(content: bytes) -> None:
        write(file, content)
        with only_own_errors():
            page.render(report.run(run.path))

    check()
