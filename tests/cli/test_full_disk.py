"""A full disk: exit code 1, and nothing that was written before is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.runs.metrics import read_steps
from tests.helpers.cli_checks import assert_folder_is_usable, assert_refused, file_contents
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

FILES = ("adapter/adapter_model.safetensors", "checkpoints/step-000003/trained.safetensors")


@contextmanager
def full_disk(part: str) -> Iterator[None]:
    """Make writing fail with "no space left" inside the block.

    part: pattern of the paths that this affects; they are written to `/dev/full` instead.
    """
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    real_open = Path.open

    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        full = re.search(part, str(path)) and mode[0] in "wxa"
        return real_open(device if full else path, mode, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_)
        yield


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (r"step-000002\.\w+\.partial/trained", ("the checkpoint", "step-000002")),
        (r"step-000002\.\w+\.partial/state", ("the checkpoint", "step-000002")),
        (r"run/\.adapter\.\w+\.partial/adapter_model", ("the adapter", "run/adapter")),
        (r"run/\.adapter\.\w+\.partial/\.?adapter_config", ("the adapter", "run/adapter")),
        ("memory", ("memory", "run/memory.json")),
    ],
)
def test_a_full_disk_loses_nothing_that_was_written(
    job_recipe: Path, trained_recipe: Path, part: str, words: tuple[str, ...]
) -> None:
    run = job_recipe.parent / "run"
    with full_disk(part):
        assert_refused(qlora("train", job_recipe), 1, "could not be written", "--resume", *words)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert list(run.glob("checkpoints/step-*/state.pt"))
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".tmp")]
    outcome = qlora("train", job_recipe, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    for file in FILES:
        assert (run / file).read_bytes() == (trained_recipe.parent / "run" / file).read_bytes()
    assert len(read_steps(run / "metrics.jsonl")) == 3


@pytest.mark.parametrize(("part", "file"), [("metrics", "metrics.jsonl"), ("run.json", "run.json")])
def test_a_disk_that_is_full_at_the_start(job_recipe: Path, part: str, file: str) -> None:
    with full_disk(part):
        assert_refused(
            qlora("train", job_recipe), 1, f"run/{file}", "could not be written", "No space left"
        )
    assert_folder_is_usable(job_recipe)


def test_a_full_disk_on_which_the_status_cannot_be_written(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.train import loop

    real = loop.save_checkpoint
    with ExitStack() as stack, monkeypatch.context() as patch:

        def full_now(*arguments: Any) -> Any:
            stack.enter_context(full_disk("/run/"))
            return real(*arguments)

        patch.setattr(loop, "save_checkpoint", full_now)
        assert_refused(
            qlora("train", job_recipe), 1, "the checkpoint could not be written", "No space left"
        )
    assert json.loads((job_recipe.parent / "run" / "run.json").read_text())["status"] == "running"
    outcome = qlora("train", job_recipe, "--resume")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("part", [".safetensors", "config.json", "merge.json"])
def test_a_full_disk_while_merging(trained_recipe: Path, tmp_path: Path, part: str) -> None:
    run, out = trained_recipe.parent / "run", tmp_path / "merged"
    before = file_contents(run)
    with full_disk(part):
        assert_refused(qlora("merge", run, "--out", out), 1, out, "could not be written")
    assert not out.exists()
    assert file_contents(run) == before
    assert qlora("merge", run, "--out", out).code == 0
    assert qlora("verify", out, "--against", run).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
