"""pyproject.toml names what is there."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from qlora_cli.recipe.shipped import shipped_recipes


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_every_folder_with_code_is_a_named_package(root: Path, project: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(root) for path in (root / "qlora_cli").rglob("__init__.py")}
    found = {".".join(folder.parts) for folder in folders}
    named = set(project["tool"]["setuptools"]["packages"])
    assert named == found | set(project["tool"]["setuptools"]["package-dir"])


def test_the_shipped_recipes_are_those_of_the_checkout(root: Path) -> None:
    assert shipped_recipes() == {path.stem: path for path in (root / "recipes").glob("*.yaml")}


def test_every_direct_dependency_is_pinned(root: Path, project: dict[str, Any]) -> None:
    lines = (root / "tools" / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower() for line in lines if not line.startswith("#")}
    wanted = [*project["project"]["dependencies"]]
    wanted += project["project"]["optional-dependencies"]["test"]
    assert {Requirement(line).name.lower() for line in wanted} <= pins


def test_constraints_name_no_place_and_no_build(root: Path) -> None:
    text = (root / "tools" / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in text
    assert "://" not in text
    assert "+" not in text
