"""A process that ends at a named moment loses nothing: the same job again gives the same bytes."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.main import run
from qlora_cli.data.load import RowLoader
from qlora_cli.errors import Interrupted
from qlora_cli.events import Silent
from qlora_cli.files import atomic, safetensors_io
from qlora_cli.files.source import FolderSource
from qlora_cli.jobs import merge, prepare_training, report
from qlora_cli.runs.layout import RunFolder
from qlora_cli.tasks.causal import CausalTask
from qlora_cli.train import evaluation, loop
from qlora_cli.ui import report as page
from tests.helpers.forked import in_process, training
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import assert_same_run, make_bases, recipe_of

pytestmark = pytest.mark.slow

TRAIN = {"checkpoint_every": 2, "eval_every": 2}
Moment = Callable[[Callable[[], object]], object]
"""Patches the package in the forked process, so that a function is called at the moment."""


def after(calls: int, end: Callable[[], object]) -> Callable[[], object]:
    """Return a function that calls `end` when it is called for the given time, counted from 1."""
    remaining = [calls]

    def count() -> None:
        remaining[0] -= 1
        if not remaining[0]:
            end()

    return count


def written(name: str, number: int = 1, parent: str = "") -> Moment:
    """Return the moment when a file or folder has been written and is not yet in its place.

    parent: the name of its folder; empty for any.
    """

    def patch(end: Callable[[], object]) -> None:
        real, count = atomic._sync_file, after(number, end)

        def sync(file: Path) -> None:
            if f"{parent}/.{name}." in str(file):
                count()
            real(file)

        atomic._sync_file = sync

    return patch


def half_line(module: Any, number: int) -> Moment:
    """Return the moment when half of a line of metrics.jsonl has been written."""

    def patch(end: Callable[[], object]) -> None:
        real, count = module.append_line, after(number, end)

        def append(file: Path, line: dict[str, Any]) -> None:
            before = file.read_text() if file.exists() else ""
            real(file, line)
            whole = file.read_text()
            file.write_text(whole[: (len(before) + len(whole)) // 2])
            count()
            file.write_text(whole)

        module.append_line = append

    return patch


def in_call(owner: Any, name: str, number: int = 1) -> Moment:
    """Return the moment before a call of a function."""

    def patch(end: Callable[[], object]) -> None:
        real, count = getattr(owner, name), after(number, end)

        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return real(*arguments, **options)

        setattr(owner, name, call)

    return patch


def with_empty_cache(moment: Moment) -> Moment:
    """Return a moment of a process that finds no tokens and no packed base in the cache."""

    def patch(end: Callable[[], object]) -> None:
        os.environ["QLORA_CACHE"] = tempfile.mkdtemp()
        moment(end)

    return patch


TRAINING: dict[str, Moment] = {
    "run.json, at the start": written("run.json"),
    "run.json, after loading": written("run.json", 2),
    "run.json, at the end": written("run.json", 4),
    "evaluation before training": in_call(evaluation, "_until_stop"),
    "evaluation in training": in_call(CausalTask, "evaluate", 3),
    "a step": in_call(loop, "train_step", 4),
    "line of a step": half_line(loop, 3),
    "line of an evaluation": half_line(evaluation, 2),
    "first checkpoint": written("step-000002"),
    "last checkpoint": written("step-000005", 3),
    "memory.json": written("memory.json"),
    "timeline.json": written("timeline.json", 2),
    "adapter of a checkpoint": written("adapter"),
    "exported adapter": written("adapter", parent="run"),
}
BEGINNING: dict[str, Moment] = {
    "tokenization": with_empty_cache(in_call(RowLoader, "_encode_into")),
    "planning": in_call(prepare_training, "choose_policy"),
    "loading": with_empty_cache(in_call(FolderSource, "read", 3)),
}
"""Moments before a run has something to keep."""
STOPS: dict[str, Moment] = {
    **BEGINNING,
    "evaluation before training": TRAINING["evaluation before training"],
    "a step": in_call(loop, "train_step"),
    "evaluation in training": in_call(CausalTask, "evaluate"),
    "a checkpoint": written("step-000003"),
    "exported adapter": TRAINING["exported adapter"],
    "memory.json": written("memory.json"),
    "run.json, at the end": TRAINING["run.json, at the end"],
}
"""Where the processes of one run are stopped, one after the other."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def ended(moment: Moment, job: Callable[[], object], name: str = "SIGKILL", at: str = "") -> None:
    """Run a job in a fork, which sends itself a signal at a moment. It must not end by itself."""

    def patched() -> object:
        moment(lambda: os.kill(os.getpid(), getattr(signal, name)))
        return job()

    assert not in_process(patched), f"the moment did not come: {at}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama")


@pytest.fixture(scope="module")
def whole(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run that was not ended."""
    return train_run(recipe_of(bases, tmp_path_factory.mktemp("whole") / "run", train=TRAIN))


@pytest.mark.parametrize("moment", [*BEGINNING, *TRAINING])
def test_killed_training(tmp_path: Path, bases: Path, whole: RunFolder, moment: str) -> None:
    recipe = recipe_of(bases, tmp_path / "run", train=TRAIN)
    ended((BEGINNING | TRAINING)[moment], training(recipe))
    assert in_process(training(recipe))
    assert_finished(RunFolder(tmp_path / "run"), whole)


def assert_finished(run: RunFolder, whole: RunFolder) -> None:
    assert_same_run(run, whole)
    assert run.read()["status"] == "done"
    assert not [path.name for path in run.path.rglob("*.partial")]


@pytest.mark.parametrize("name", SIGNALS)
def test_stopped_training(tmp_path: Path, bases: Path, whole: RunFolder, name: str) -> None:
    """A signal stops each process of a run at another moment; every step is kept."""
    folder = RunFolder(tmp_path / "run")
    recipe = recipe_of(bases, folder.path, train={**TRAIN, "checkpoint_every": 1})
    for phase, moment in STOPS.items():
        before = folder.steps()
        ended(moment, training(recipe), name, phase)
        if folder.run_json.is_file():
            assert folder.read()["status"] == "interrupted", phase
            assert len(folder.steps()) > len(before) or phase not in ("a step", "a checkpoint")
        else:
            assert phase in (*BEGINNING, "evaluation before training")
            assert not folder.path.exists(), phase
        assert not [path.name for path in tmp_path.rglob("*.partial")], phase
    assert folder.steps() == [1, 2, 3, 4, 5]
    assert in_process(training(recipe))
    assert_finished(folder, whole)


MERGING = {
    "first tensor": in_call(safetensors_io, "_write_tensor"),
    "later tensor": in_call(safetensors_io, "_write_tensor", 8),
    "merge.json, at the start": written("merge.json"),
    "merge.json, at the end": written("merge.json", 2),
    "the complete folder": in_call(atomic, "_sync_folder"),
}


@pytest.mark.parametrize("moment", MERGING)
def test_merging(tmp_path: Path, whole: RunFolder, moment: str) -> None:
    def merging(out: Path) -> Callable[[], object]:
        return lambda: merge.run(
            whole.path, out=out, dtype=None, base="original", observer=Silent()
        )

    out, expected = tmp_path / "out", tmp_path / "expected"
    ended(MERGING[moment], merging(out))
    assert not out.exists(), "an incomplete merge must not have its name"
    for folder in (out, expected):
        assert in_process(merging(folder))
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    for file in expected.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "expected"}


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("command", ["merge", "report"])
def test_stopped_commands(tmp_path: Path, whole: RunFolder, command: str, name: str) -> None:
    """A signal ends a command as Ctrl-C does. What is left is what the next merge continues."""
    outputs = {"merge": ("--out", "out"), "report": ("--html", "out.html")}
    moments = {"merge": MERGING["later tensor"], "report": written("out.html")}
    option, output = outputs[command]
    words = [command, str(whole.path), option, str(tmp_path / output)]
    ended(moments[command], lambda: exit_with(run(words)), name)
    left = [*tmp_path.iterdir()]
    assert left == atomic.partial_folders(tmp_path / output)
    assert len(left) == (command == "merge")


def exit_with(code: int) -> None:
    """Raise SystemExit if the exit code of a command is that of an interruption."""
    if code == Interrupted.exit_code:
        raise SystemExit(code)


@pytest.mark.parametrize("name", ["report.html", "memory.png"])
def test_reporting(whole: RunFolder, name: str) -> None:
    def reporting() -> None:
        page.write(report.run(whole.path, html=whole.report, png=whole.memory_png))

    assert in_process(reporting)
    before = whole.report.read_text()
    ended(written(name), reporting)
    assert whole.report.read_text() == before
    assert in_process(reporting)
    assert whole.report.read_text() == before
