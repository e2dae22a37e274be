"""The runs of a sweep: every combination of the values of some settings, with several seeds.

`adapter.rank=1,2 train.lr=1e-4,1e-3` are four cells. Each cell has one run for each seed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import Problem, RecipeError, UsageError
from qlora_cli.recipe.describe import field_at, takes_list, takes_text
from qlora_cli.recipe.load import LoadedRecipe, load_with_dropped
from qlora_cli.recipe.override import parse_override
from qlora_cli.recipe.run_names import short_keys, unique_names
from qlora_cli.recipe.schema import Recipe

SEED = "train.seed"
MAX_CELLS = 10_000
"""Larger grids are refused: every cell is loaded and checked before the first run."""


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes in a sweep, as overrides contain them."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class GridRun:
    """One run of a sweep.

    settings: key -> value of the settings that differ between cells, without those that have no
    effect in this cell. overrides: the complete overrides of the recipe, with which `qlora train`
    does the same run. name: of the run's folder within the sweep's.
    """

    name: str
    settings: Mapping[str, str]
    seed: int
    recipe: Recipe
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """The runs of a sweep, and what is not run.

    folder: of the sweep. axes: the settings with several values. runs: the runs of a cell follow
    each other. refused: settings of a cell that the recipe refuses -> the reason. dropped: one line
    for the user per setting that has no effect in some cells.
    """

    folder: Path
    axes: tuple[Axis, ...]
    runs: tuple[GridRun, ...]
    refused: tuple[tuple[Mapping[str, str], str], ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Cell:
    """A combination of values, and the recipe with them; settings: as of `GridRun`."""

    settings: Mapping[str, str]
    overrides: tuple[str, ...]
    loaded: LoadedRecipe


def parse_axis(text: str) -> Axis | Problem:
    """Parse `key=v1,v2`, or `key=v1;v2`; return its problem if it is not valid.

    Commas separate the values of numbers and words. Lists, texts and mappings can contain commas,
    so their values are separated by semicolons only. A semicolon always separates.
    """
    key, sign, raw = (part.strip() for part in text.partition("="))
    info = field_at(key)
    if info is None or not sign:
        found = parse_override(text)
        assert isinstance(found, Problem)
        return found
    separator = ";" if ";" in raw or takes_list(info) or takes_text(info) else ","
    values = tuple(value.strip() for value in raw.split(separator))
    if len(values) > 1 and not all(values):
        return Problem(f"override {text}", "has an empty value between its separators")
    for value in values:
        if isinstance(found := parse_override(f"{key}={value}"), Problem):
            return found
    return Axis(key, tuple(dict.fromkeys(values)))


def make_grid(
    path: Path, texts: Sequence[str], seeds: int | None = None, sample: int | None = None
) -> Grid:
    """Return the runs of a sweep over the recipe at `path`.

    texts: overrides with one or several values each. seeds: number of runs of each cell, with seeds
    from `train.seed` upwards; None for one. sample: number of cells that are chosen at random; None
    for all. Raises UsageError for a grid that is too large or has no values to compare, RecipeError
    if a value is refused in every cell that has it.
    """
    axes = _parse_axes(texts)
    _check_axes(axes, seeds)
    varied = [axis for axis in axes if len(axis.values) > 1]
    cells, refused = _load_cells(path, axes, {axis.key for axis in varied})
    if not cells:
        raise _all_refused(path, refused)
    _check_each_value(path, varied, cells, refused)
    _check_dropped(axes, cells)
    dropped = dict.fromkeys(line for cell in cells for line in cell.loaded.dropped.values())
    if sample is not None and sample < len(cells):
        chosen = random.Random(0).sample(range(len(cells)), sample)
        cells = [cells[number] for number in sorted(chosen)]
    folder = Path(cells[0].loaded.recipe.output)
    runs = tuple(_runs(path, cells, folder, seeds))
    reasons = tuple((settings, _reason(error)) for settings, error in refused)
    return Grid(folder, tuple(varied), runs, reasons, tuple(dropped))


def _parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Parse all axes; of a key that is set twice the last one is used. Raises RecipeError."""
    parsed = [parse_axis(text) for text in texts]
    problems = [item for item in parsed if isinstance(item, Problem)]
    if problems:
        raise RecipeError("the settings of the sweep have problems", problems)
    return list({axis.key: axis for axis in parsed if isinstance(axis, Axis)}.values())


def _check_axes(axes: Sequence[Axis], seeds: int | None) -> None:
    """Raise UsageError if there is nothing to compare, or if the number of cells is too large."""
    sizes = {axis.key: len(axis.values) for axis in axes}
    if sizes.get("output", 1) > 1:
        raise UsageError("a sweep has one folder", where="output")
    if seeds is not None and sizes.get(SEED, 1) > 1:
        raise UsageError("the seeds are given twice", where=f"--seeds and {SEED}")
    if max(sizes.values(), default=1) == 1 and (seeds or 1) == 1:
        raise UsageError(
            "there is only one run",
            hint="give a setting several values, such as adapter.rank=2,4,8 or "
            '"adapter.targets=[q];[q,v]", or use --seeds; `qlora train` does a single run',
        )
    total = math.prod(sizes.values())
    if total > MAX_CELLS:
        raise UsageError(f"the grid has {total:,} cells; at most {MAX_CELLS:,} are allowed")


def _load_cells(
    path: Path, axes: Sequence[Axis], varied: set[str]
) -> tuple[list[_Cell], list[tuple[Mapping[str, str], RecipeError]]]:
    """Return the cells of the grid that are different, and (settings, error) of refused ones."""
    cells: dict[str, _Cell] = {}
    refused: list[tuple[Mapping[str, str], RecipeError]] = []
    keys = [axis.key for axis in axes]
    for values in itertools.product(*(axis.values for axis in axes)):
        pairs = dict(zip(keys, values, strict=True))
        settings = {key: value for key, value in pairs.items() if key in varied}
        overrides = tuple(f"{key}={value}" for key, value in pairs.items())
        try:
            loaded = load_with_dropped(path, overrides, keys)
        except RecipeError as error:
            refused.append((settings, error))
            continue
        kept = {key: value for key, value in settings.items() if key not in loaded.dropped}
        given = tuple(f"{key}={pairs[key]}" for key in keys if key not in loaded.dropped)
        # Cells that differ only in settings without effect are the same cell.
        cells.setdefault(loaded.recipe.model_dump_json(), _Cell(kept, given, loaded))
    return list(cells.values()), refused


def _check_each_value(
    path: Path,
    axes: Sequence[Axis],
    cells: Sequence[_Cell],
    refused: Sequence[tuple[Mapping[str, str], RecipeError]],
) -> None:
    """Raise RecipeError if a value of an axis is refused in every cell that has it."""
    for axis in axes:
        for value in axis.values:
            errors = [(cell, e) for cell, e in refused if cell.get(axis.key) == value]
            if errors and not any(cell.settings.get(axis.key) == value for cell in cells):
                raise _all_refused(path, errors)


def _all_refused(
    path: Path, refused: Sequence[tuple[Mapping[str, str], RecipeError]]
) -> RecipeError:
    """Return the error of a value that no cell can have, with its problems."""
    problems = dict.fromkeys(problem for _, error in refused for problem in error.problems)
    return RecipeError(f"{path} cannot be used with some values of the sweep", list(problems))


def _check_dropped(axes: Sequence[Axis], cells: Sequence[_Cell]) -> None:
    """Raise RecipeError if a setting of the command line has no effect in any cell."""
    for axis in axes:
        if all(axis.key in cell.loaded.dropped for cell in cells):
            text = f"{axis.key}={','.join(axis.values)}"
            raise RecipeError(
                "a setting of the sweep has no effect",
                [Problem(f"override {text}", cells[0].loaded.dropped[axis.key])],
            )


def _runs(path: Path, cells: Sequence[_Cell], folder: Path, seeds: int | None) -> Iterator[GridRun]:
    """Yield the runs of all cells."""
    labels = short_keys({key for cell in cells for key in cell.settings} | {SEED})
    rows: list[tuple[_Cell, int, dict[str, str]]] = []
    for cell in cells:
        first = cell.loaded.recipe.train.seed
        for seed in range(first, first + (seeds or 1)):
            named = {labels[key]: value for key, value in cell.settings.items()}
            rows.append((cell, seed, named | ({labels[SEED]: str(seed)} if seeds else {})))
    names = unique_names([named for _, _, named in rows])
    for (cell, seed, _), name in zip(rows, names, strict=True):
        settings = {key: value for key, value in cell.settings.items() if key != SEED}
        others = [text for text in cell.overrides if not text.startswith(("output=", f"{SEED}="))]
        overrides = (*others, f"{SEED}={seed}", f"output={folder / name}")
        recipe = load_with_dropped(path, overrides).recipe
        yield GridRun(name, settings, seed, recipe, overrides)


def _reason(error: RecipeError) -> str:
    return "; ".join(str(problem) for problem in error.problems)
