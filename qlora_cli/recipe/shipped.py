"""Find the recipes that are part of the package, and the recipe file that an argument names."""

from __future__ import annotations

import difflib
from pathlib import Path

from qlora_cli.errors import UsageError

_PACKAGE = Path(__file__).parent.parent
# A wheel contains the recipes inside the package (pyproject.toml maps the folder). In a checkout,
# also one with an editable install, they are in the folder `recipes` next to the package.
_FOLDERS = (_PACKAGE / "shipped_recipes", _PACKAGE.parent / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes sorted by name: name -> file."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(text: str | Path) -> Path:
    """Return the recipe file for a path or for the name of a shipped recipe.

    Raises UsageError if there is no such file; its hint names similar files and recipes.
    """
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError("is a folder; a recipe is a YAML file", where=str(text))
    shipped = shipped_recipes()
    if str(text) in shipped:
        return shipped[str(text)]
    raise UsageError("there is no such recipe", where=str(text), hint=_hint(path))


def _hint(path: Path) -> str:
    neighbors = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    shipped = list(shipped_recipes())
    similar = [
        *difflib.get_close_matches(str(path), [str(file) for file in neighbors], n=2),
        *difflib.get_close_matches(path.stem, shipped, n=2),
    ]
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    return f"shipped recipes: {', '.join(shipped)}" if shipped else "write the path of a YAML file"


def summary(path: Path) -> str:
    """Return the first line of a recipe's header comment, which describes its purpose."""
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("#").strip() if first.startswith("#") else ""
