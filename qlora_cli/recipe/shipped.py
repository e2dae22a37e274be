"""The recipes that come with the tool, and finding the file that a command line means."""

from __future__ import annotations

import difflib
from pathlib import Path

from qlora_cli.errors import UsageError

_PACKAGE = Path(__file__).parent.parent
# Built, the recipes are a part of the package (pyproject.toml maps them); in a checkout they lie
# beside it, and an editable install is a checkout.
_FOLDERS = (_PACKAGE / "shipped_recipes", _PACKAGE.parent / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of each recipe that comes with the tool, sorted by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(text: str | Path) -> Path:
    """The file that `text` means: a path, or the name of a shipped recipe.

    Raises UsageError that names what is near where there is no such file.
    """
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError("is a folder; a recipe is a YAML file", where=str(text))
    shipped = shipped_recipes()
    if str(text) in shipped:
        return shipped[str(text)]
    raise UsageError("there is no such recipe", where=str(text), hint=_nearest(path))


def _nearest(path: Path) -> str:
    beside = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    shipped = list(shipped_recipes())
    near = [
        *difflib.get_close_matches(str(path), [str(file) for file in beside], n=2),
        *difflib.get_close_matches(path.stem, shipped, n=2),
    ]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"shipped recipes: {', '.join(shipped)}" if shipped else "write the path of a YAML file"


def summary(path: Path) -> str:
    """The first line of a recipe's header, which says what it is for."""
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("#").strip() if first.startswith("#") else ""
