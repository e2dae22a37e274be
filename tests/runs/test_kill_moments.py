"""A process that ends at a named moment loses nothing: the same job again gives the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import Silent
from qlora_cli.files import atomic, safetensors_io
from qlora_cli.jobs import merge, report
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


def written(name: str, number: int = 1) -> Moment:
    """Return the moment when a file or folder has been written and is not yet in its place."""

    def patch(end: Callable[[], object]) -> None:
        real, count = atomic._sync_file, after(number, end)

        def sync(file: Path) -> None:
            if f".{name}." in str(file):
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


TRAINING: dict[str, Moment] = {
    "run.json, at the start": written("run.json"),
    "run.json, after loading": written("run.json", 2),
    "run.json, at the end": written("run.json", 3),
    "evaluation before training": in_call(evaluation, "_until_stop"),
    "evaluation in training": in_call(CausalTask, "evaluate", 3),
    "a step": in_call(loop, "train_step", 4),
    "line of a step": half_line(loop, 3),
    "line of an evaluation": half_line(evaluation, 2),
    "first checkpoint": written("step-000002"),
    "last checkpoint": written("step-000005", 3),
    "memory.json": written("memory.json"),
    "timeline.json": written("timeline.json", 2),
    "adapter": written("adapter"),
}
PHASES = {
    "SIGINT": ("evaluation in training", "a step", "first checkpoint", "adapter"),
    "SIGTERM": ("run.json, after loading", "evaluation before training", "line of a step"),
    "SIGKILL": tuple(TRAINING),
}
CASES = [(name, moment) for name, moments in PHASES.items() for moment in moments]


def ended(moment: Moment, job: Callable[[], object], name: str = "SIGKILL") -> None:
    """Run a job in a fork, which sends itself a signal at a moment. It must not end by itself."""

    def patched() -> object:
        moment(lambda: os.kill(os.getpid(), getattr(signal, name)))
        return job()

    assert not in_process(patched), "the moment did not come"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama")


@pytest.fixture(scope="module")
def whole(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run that was not ended."""
    return train_run(recipe_of(bases, tmp_path_factory.mktemp("whole") / "run", train=TRAIN))


@pytest.mark.parametrize(("name", "moment"), CASES)
def test_training(tmp_path: Path, bases: Path, whole: RunFolder, name: str, moment: str) -> None:
    recipe = recipe_of(bases, tmp_path / "run", train=TRAIN)
    ended(TRAINING[moment], training(recipe), name)
    assert in_process(training(recipe))
    run = RunFolder(tmp_path / "run")
    assert_same_run(run, whole)
    assert run.read()["status"] == "done"
    assert not [path.name for path in run.path.rglob("*.partial")]


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
