"""`qlora cache` lists and removes the tokens that runs keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_cli.data import token_cache
from qlora_cli.files.cache import locked
from tests.helpers.cli_helpers import qlora


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose tokens are kept in an empty cache."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "_MIN_BYTES", 0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"day {n}"}) for n in range(9)))
    content = {"model": {"name": "starter"}, "data": {"train": str(rows), "seq_len": 64}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


def test_an_empty_cache_is_listed_and_cleared(recipe: Path, tmp_path: Path) -> None:
    empty = {"folder": str(tmp_path / "cache"), "entries": [], "bytes": 0}
    assert qlora("cache", "list", "--json").json == {**empty, "cleared": False}
    assert qlora("cache", "clear", "--json").json == {**empty, "cleared": True}
    assert "0 entries" in qlora("cache", "list").out
    assert not (tmp_path / "cache").exists()


def test_entries_are_listed_and_cleared(recipe: Path, tmp_path: Path) -> None:
    assert qlora("data", recipe).code == 0
    listed = qlora("cache", "list", "--json").json
    (entry,) = listed["entries"]
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert listed["bytes"] == entry["bytes"] == sum(path.stat().st_size for path in files)
    assert entry["kind"] == "tokens"
    assert "rows.jsonl" in entry["description"]
    text = qlora("cache", "list").out
    assert "tokenized data" in text
    assert "1 entry" in text
    assert qlora("cache", "clear", "--json").json == {**listed, "cleared": True}
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_what_a_killed_process_left_is_removed(recipe: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "cache" / "tokens" / ".0123.0123456789abcdef.partial"
    unfinished.mkdir(parents=True)
    (unfinished / "train.arrow").write_text("half")
    assert qlora("cache", "clear").code == 0
    assert not unfinished.exists()


def test_an_entry_that_is_being_written_is_kept(recipe: Path, tmp_path: Path) -> None:
    qlora("data", recipe)
    (entry,) = qlora("cache", "list", "--json").json["entries"]
    with locked(tmp_path / "cache" / "tokens" / entry["key"]):
        assert qlora("cache", "clear", "--json").json["entries"] == []
    assert qlora("cache", "list", "--json").json["entries"] == [entry]


def test_a_folder_without_a_readable_entry_is_listed_as_damaged(
    recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache" / "tokens" / "key").mkdir(parents=True)
    (entry,) = qlora("cache", "list", "--json").json["entries"]
    assert (entry["key"], entry["description"]) == ("key", "damaged")
    qlora("cache", "clear")
    assert qlora("cache", "list", "--json").json["entries"] == []
