"""Small recipes on the embedded base and on a random one, and finished runs that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

import qlora_cli.starter
from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import make_base, make_rows

STARTER = Path(qlora_cli.starter.__file__).parent
STARTER_RECIPE = """\
# A few steps on the embedded base.
model: {{name: starter}}
data: {{train: {rows}, eval: {held_out}, seq_len: 128}}
adapter: {{rank: 4}}
train: {{steps: 3, micro_batch: 2, grad_accum: 1, checkpoint_every: 2}}
output: {folder}/{{name}}
"""
TINY_RECIPE = """\
model: {{name: {base}}}
adapter: {{rank: 2}}
data: {{train: {rows}, seq_len: 32}}
train: {{steps: 3, grad_accum: 1, checkpoint_every: 1}}
output: {folder}/run
"""


def _copy_first_rows(source: Path, target: Path, count: int) -> Path:
    lines = source.read_text().splitlines(keepends=True)[:count]
    target.write_text("".join(lines))
    return target


def _write_tiny_recipe(base: Path, folder: Path) -> Path:
    rows = make_rows(folder / "rows.jsonl")
    path = folder / "job.yaml"
    path.write_text(TINY_RECIPE.format(base=base, rows=rows, folder=folder))
    return path


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with eight held-out rows."""
    folder = tmp_path_factory.mktemp("rows")
    return _copy_first_rows(STARTER / "held_out.jsonl", folder / "held_out.jsonl", 8)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> Path:
    """Return a recipe of three steps on the embedded base; `output` is in the same folder."""
    folder = tmp_path_factory.mktemp("small")
    rows = _copy_first_rows(STARTER / "train.jsonl", folder / "rows.jsonl", 64)
    path = folder / "small.yaml"
    path.write_text(STARTER_RECIPE.format(rows=rows, held_out=held_out, folder=folder))
    return path


@pytest.fixture(scope="session")
def run(recipe: Path) -> Path:
    """Return the folder of a finished run of `recipe`, which no test may change."""
    outcome = qlora("train", recipe)
    assert outcome.code == 0, outcome.err
    return recipe.parent / "small"


@pytest.fixture(scope="session")
def merged(run: Path) -> Path:
    """Return the folder of the merged model of `run`."""
    folder = run.parent / "merged"
    outcome = qlora("merge", run, "--out", folder)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama model in one file. Training on it takes about a second."""
    return make_base(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="session")
def sharded_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama model in several files."""
    return make_base(tmp_path_factory.mktemp("sharded"), "llama", shard="100KB")


@pytest.fixture
def job_recipe(tiny_base: Path, tmp_path: Path) -> Path:
    """Return a recipe of three steps on `tiny_base`; its run's folder is `run` next to it."""
    return _write_tiny_recipe(tiny_base, tmp_path)


@pytest.fixture(scope="session")
def trained_recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a finished run on `tiny_base`, which no test may change."""
    path = _write_tiny_recipe(tiny_base, tmp_path_factory.mktemp("trained"))
    outcome = qlora("train", path)
    assert outcome.code == 0, outcome.err
    return path
