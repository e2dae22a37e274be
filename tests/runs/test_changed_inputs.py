"""A run is resumed with the inputs that it was begun with, from wherever they are now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.errors import Interrupted, ModelError, UsageError
from qlora_cli.files import checksums
from qlora_cli.files.source import fingerprint
from qlora_cli.jobs import train
from qlora_cli.recipe.schema import Model, Recipe
from qlora_cli.runs.layout import RunFolder
from tests.helpers.interrupted import train_run
from tests.helpers.observers import NoteRecorder
from tests.helpers.resumed_runs import make_bases, recipe_of
from tests.helpers.runs import make_base

pytestmark = pytest.mark.slow


@pytest.fixture
def stopped(tmp_path: Path) -> Recipe:
    """Return the recipe of a run that was stopped after step 2 of 5."""
    make_bases(tmp_path, "llama")
    recipe = recipe_of(tmp_path, tmp_path / "run", train={"checkpoint_every": 1})
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    return recipe


def change_json(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def reorder_rows(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(reversed(lines)))


def edit_row(folder: Path) -> None:
    text = (folder / "rows.jsonl").read_text()
    letter = next(letter for letter in "abcdefgh" if letter in text)
    (folder / "rows.jsonl").write_text(text.replace(letter, "z", 1))


def halve_rows(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[:9]))


def change_norm(folder: Path) -> None:
    change_json(folder / "llama" / "config.json", "rms_norm_eps", 0.01)


def flip_weight(folder: Path) -> None:
    """In the middle of the file, where no tensor begins or ends."""
    (file,) = (folder / "llama").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + header])
    begin, end = max(
        (entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"),
        key=lambda offsets: offsets[1] - offsets[0],
    )
    content[8 + header + (begin + end) // 2] ^= 1
    file.write_bytes(content)


FAULTS = {
    reorder_rows: (UsageError, "the rows, or the tokens that they become, have changed"),
    edit_row: (UsageError, "the rows, or the tokens that they become, have changed"),
    halve_rows: (UsageError, "have changed|recipe has changed"),
    change_norm: (ModelError, "config.json is not as it was when the run was trained"),
    flip_weight: (ModelError, "are not those that the run was trained on"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_changed_inputs_are_refused(
    stopped: Recipe, tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    error, message = FAULTS[fault]
    fault(tmp_path)
    with pytest.raises(error, match=message):
        train_run(stopped, resume=True)
    assert RunFolder(tmp_path / "run").steps() == [1, 2]


def test_moved_inputs_and_a_moved_run_are_resumed(stopped: Recipe, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    for name in ("rows.jsonl", "llama", "run"):
        shutil.move(tmp_path / name, new / name)
    rows = str(new / "rows.jsonl")
    data = stopped.data.model_copy(update={"train": rows, "eval": rows})
    moved = stopped.model_copy(
        update={
            "data": data,
            "model": Model(name=str(new / "llama")),
            "output": str(new / "run"),
        }
    )
    run = train_run(moved, resume=True)
    assert run.read()["status"] == "done"
    assert run.read()["base_folder"] == str(new / "llama")


def test_other_versions_are_reported_and_kept(stopped: Recipe, tmp_path: Path) -> None:
    run, recorder = RunFolder(tmp_path / "run"), NoteRecorder()
    content = run.read()
    run.write(content | {"versions": content["versions"] | {"torch": "2.11.0"}})
    train.run(stopped, recipe_path=None, resume=True, observer=recorder)
    assert any(
        "versions have changed" in note and "torch 2.11.0" in note for note in recorder.notes
    )
    assert run.read()["versions"]["torch"] == "2.11.0"


def test_the_checksum_of_a_large_file_is_kept_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "llama")
    (file,) = base.glob("*.safetensors")
    monkeypatch.setattr(checksums, "_LARGE_BYTES", 1)
    first = fingerprint(base)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "sha256_of", lambda _: pytest.fail("the file is read again"))
        assert fingerprint(base) == first
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(base) != first
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(base) == first
