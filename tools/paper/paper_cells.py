"""What an experiment is: cells with settings, a measurement, and the place where both happen."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_cli.cli import main as qlora_main
from qlora_cli.recipe.document import read_document

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "tools" / "measurements" / "paper"
_INTERRUPTED = 130


class CellError(Exception):
    """A cell could not be measured; the message names the reason."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    name: of the method or setting. settings: `key=value` for the recipe, or options of the
    measurement. minutes: what it takes about, on one core; used by --budget until it was measured.
    """

    name: str
    settings: tuple[str, ...] = ()
    seed: int = 0
    minutes: float = 1.0

    def with_seeds(self, num: int) -> tuple[Cell, ...]:
        """Return this cell for seeds 0 to num - 1."""
        return tuple(replace(self, seed=seed) for seed in range(num))

    def options(self) -> dict[str, str]:
        """Return the settings as key -> value."""
        return dict(setting.split("=", 1) for setting in self.settings)


@dataclass
class Workspace:
    """The folder in which cells are measured, and the commands that a cell has run.

    folder: the working directory of the commands, so that paths in recipes are relative to it.
    small: use few rows, steps and layers, as tests do. recipes: file -> digest of what was used.
    """

    folder: Path
    small: bool
    commands: list[str] = field(default_factory=list)
    recipes: dict[str, str] = field(default_factory=dict)
    is_resumed: bool = False

    def qlora(self, *words: str) -> dict[str, Any]:
        """Run `qlora WORDS --json` in the folder and return the object that it prints.

        Raises CellError with the command's error, KeyboardInterrupt if it was interrupted.
        """
        self.commands.append(" ".join(["qlora", *words]))
        self.recipes |= {word: recipe_digest(word) for word in words if word.startswith("recipes/")}
        out, err = io.StringIO(), io.StringIO()
        with working_directory(self.folder), redirect_stdout(out), redirect_stderr(err):
            code = qlora_main.run([*words, "--json"])
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise CellError(f"qlora {' '.join(words)}: {err.getvalue()[-2000:].strip()}")
        return dict(json.loads(out.getvalue()))

    def train(self, recipe: str, run: str, *settings: str) -> dict[str, Any]:
        """Train a recipe of recipes/paper into the folder `run`, or resume that run."""
        words = [f"recipes/paper/{recipe}.yaml", *settings, f"output={run}"]
        if (self.folder / run / "run.json").is_file():
            self.is_resumed = True
            words.append("--resume")
        return self.qlora("train", *words)

    def discard(self, run: str) -> None:
        """Remove a run whose result is measured."""
        shutil.rmtree(self.folder / run)


Measure = Callable[[Cell, Workspace], dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """A claim of the paper and the cells that check it.

    needs: names of what the workspace must contain (`paper_data.py`). small: the cells of the small
    version. measure: returns the result of a cell, which JSON can hold.
    """

    name: str
    needs: tuple[str, ...]
    cells: tuple[Cell, ...]
    small: tuple[Cell, ...]
    measure: Measure

    @property
    def file_name(self) -> str:
        """Return the name of the JSON file in tools/measurements/paper."""
        return f"{self.name}.json"


def recipe_digest(file: str) -> str:
    """Return a digest of a recipe's settings, without comments. file: relative to the checkout."""
    content = read_document((ROOT / file).read_text(encoding="utf-8")).content
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def find_cell(entries: Iterable[Mapping[str, Any]], cell: Cell) -> Mapping[str, Any] | None:
    """Return the entry of a measured cell, with any settings; None if there is none."""
    return next((e for e in entries if (e["name"], e["seed"]) == (cell.name, cell.seed)), None)


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Change the working directory inside the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
