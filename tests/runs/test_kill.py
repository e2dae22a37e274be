"""A run, a merge and a report that are killed at any moment are completed, bit for bit.

The processes are forks of the test, which has imported everything, so that most of the random
moments are in the job and not in its imports.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.events import Silent
from qlora_cli.jobs import merge, report
from qlora_cli.runs.layout import RunFolder
from tests.helpers.forked import in_process, training
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import assert_same_run, make_bases, recipe_of

pytestmark = pytest.mark.slow

MOMENTS = int(os.environ.get("QLORA_KILLS", "15"))
"""Number of kills of the training run; 50 take minutes."""
TRAIN = {"checkpoint_every": 1, "eval_every": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama")


@pytest.fixture(scope="module")
def whole(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run that was not killed."""
    return train_run(recipe_of(bases, tmp_path_factory.mktemp("whole") / "run", train=TRAIN))


def duration(job: Callable[[], object]) -> float:
    began = time.monotonic()
    assert in_process(job)
    return time.monotonic() - began


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_is_resumed_to_the_same_bits(
    tmp_path: Path, bases: Path, whole: RunFolder
) -> None:
    length = duration(training(recipe_of(bases, tmp_path / "timed", train=TRAIN)))
    moments = random.Random(0)
    num_killed = 0
    recipe, number = recipe_of(bases, tmp_path / "0", train=TRAIN), 0
    while num_killed < MOMENTS:
        if in_process(training(recipe), moments.uniform(0, length)):
            assert_same_run(RunFolder(Path(recipe.output)), whole)
            number += 1
            recipe = recipe_of(bases, tmp_path / str(number), train=TRAIN)
        else:
            num_killed += 1
    assert in_process(training(recipe))
    run = RunFolder(Path(recipe.output))
    assert_same_run(run, whole)
    names = {path.name for path in run.path.iterdir()}
    assert not [name for name in names if name.endswith(".partial")]


def test_a_merge_and_a_report_that_are_killed_are_repeated(
    tmp_path: Path, whole: RunFolder
) -> None:
    def merging(out: Path) -> Callable[[], object]:
        return lambda: merge.run(
            whole.path, out=out, dtype=None, base="original", observer=Silent()
        )

    expected = tmp_path / "expected"
    length = duration(merging(expected))
    moments = random.Random(1)
    for number in range(10):
        out = tmp_path / str(number)
        while not in_process(merging(out), moments.uniform(0, 1.2 * length)):
            pass
        for file in expected.glob("*.safetensors"):
            assert (out / file.name).read_bytes() == file.read_bytes()
        assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}

    def reporting() -> object:
        return report.run(whole.path)

    length = duration(reporting)
    for _ in range(10):
        in_process(reporting, moments.uniform(0, length))
    assert in_process(reporting)
