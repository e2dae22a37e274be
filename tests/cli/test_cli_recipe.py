"""`qlora recipe`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.recipe.describe import keys
from qlora_cli.recipe.shipped import shipped_recipes
from tests.helpers.cli_helpers import qlora


def test_list_names_every_shipped_recipe_with_its_purpose() -> None:
    lines = qlora("recipe", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 3 for line in lines)


def test_show_prints_the_file_as_it_is(recipe: Path) -> None:
    assert qlora("recipe", "show", recipe).out == recipe.read_text()


def test_copy_writes_the_same_file(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert qlora("recipe", "copy", recipe).code == 0
    assert (tmp_path / recipe.name).read_text() == recipe.read_text()
    assert qlora("recipe", "copy", recipe, "mine.yaml").out == "mine.yaml\n"
    (tmp_path / "folder").mkdir()
    assert qlora("recipe", "copy", recipe, "folder").code == 0
    assert (tmp_path / "folder" / recipe.name).is_file()


def test_copy_names_the_login_for_a_gated_model(tmp_path: Path) -> None:
    gated = qlora("recipe", "copy", "llama-3.1-8b-8gb", tmp_path / "gated.yaml")
    assert gated.code == 0
    assert "meta-llama/Llama-3.1-8B is a gated model: accept its license at" in gated.err
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B" in gated.err
    assert "`hf auth login`, or set HF_TOKEN" in gated.err
    assert gated.out == f"{tmp_path / 'gated.yaml'}\n"
    assert qlora("recipe", "copy", "chat", tmp_path / "open.yaml").err == ""


def test_copy_overwrites_nothing(recipe: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    assert qlora("recipe", "copy", recipe, mine).code == 2
    assert mine.read_text() == "mine"
    assert qlora("recipe", "copy", recipe, tmp_path / "nowhere" / "x.yaml").code == 2


def test_schema_is_one_json_object_with_every_key() -> None:
    schema = qlora("recipe", "schema").json
    described = {
        f"{section}.{key}" if section else key
        for section, part in [("", schema), *schema["$defs"].items()]
        for key in part["properties"]
    }
    assert {key[0].upper() + key[1:] if "." in key else key for key in keys()} <= described
