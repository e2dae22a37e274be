"""Damaged and absurd records of a merged folder: only our own errors come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given

from qlora_cli.events import Silent
from qlora_cli.export.merge.manifest import (
    MANIFEST,
    MergeManifest,
    merged_step,
    trained_row_format,
)
from qlora_cli.export.push.card import model_card
from qlora_cli.export.push.contents import select_contents
from qlora_cli.export.verify.record import RECORD
from qlora_cli.jobs import merge, verify
from tests.helpers.fuzz import changed_json, fuzzed, only_own_errors, write
from tests.helpers.runs import make_base, make_recipe, make_rows, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    base, rows = make_base(folder / "base", "llama"), make_rows(folder / "rows.jsonl")
    run, _ = make_run(folder / "run", make_recipe(base, rows))
    merge.run(run.path, out=folder / "out", dtype="float32", base="original", observer=Silent())
    verify.run(folder / "out", against=run.path, observer=Silent())
    return folder / "out"


def test_merge_json(merged: Path) -> None:
    valid = json.loads((merged / MANIFEST).read_text())

    @fuzzed()
    @given(changed_json(valid, valid["settings"]))
    def check(content: bytes) -> None:
        write(merged / MANIFEST, content)
        for read in (merged_step, trained_row_format):
            with only_own_errors():
                read(merged)
        with only_own_errors():
            list(MergeManifest.read(merged).notes())

    check()
    write(merged / MANIFEST, json.dumps(valid).encode())


def test_verification_json(merged: Path) -> None:
    valid = json.loads((merged / RECORD).read_text())
    assert model_card(select_contents(merged, unverified=True), "owner/name")

    @fuzzed(0.5)
    @given(changed_json(valid))
    def check(content: bytes) -> None:
        write(merged / RECORD, content)
        with only_own_errors():
            model_card(select_contents(merged, unverified=True), "owner/name")

    check()
