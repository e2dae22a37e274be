"""A small recipe on the embedded base, and one run of it that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

import qlora_cli.starter
from tests.helpers.cli_helpers import qlora

STARTER = Path(qlora_cli.starter.__file__).parent
RECIPE = """\
# A few steps on the embedded base.
model: {{name: starter}}
data: {{train: {rows}, eval: {held_out}, seq_len: 128}}
adapter: {{rank: 4}}
train: {{steps: 3, micro_batch: 2, grad_accum: 1, checkpoint_every: 2}}
output: {folder}/{{name}}
"""


def _first_rows(source: Path, target: Path, count: int) -> Path:
    lines = source.read_text().splitlines(keepends=True)[:count]
    target.write_text("".join(lines))
    return target


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight held-out rows."""
    folder = tmp_path_factory.mktemp("rows")
    return _first_rows(STARTER / "held_out.jsonl", folder / "held_out.jsonl", 8)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> Path:
    """A recipe of three steps; `output` is in the same folder."""
    folder = tmp_path_factory.mktemp("small")
    rows = _first_rows(STARTER / "train.jsonl", folder / "rows.jsonl", 64)
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(rows=rows, held_out=held_out, folder=folder))
    return path


@pytest.fixture(scope="session")
def run(recipe: Path) -> Path:
    """The folder of a finished run of the recipe."""
    outcome = qlora("train", recipe)
    assert outcome.code == 0, outcome.err
    return recipe.parent / "small"


@pytest.fixture(scope="session")
def merged(run: Path) -> Path:
    """The merged model of that run."""
    folder = run.parent / "merged"
    outcome = qlora("merge", run, "--out", folder)
    assert outcome.code == 0, outcome.err
    return folder
