"""Runs the experiments on the claims of the LoRA paper (Hu et al. 2021) and writes their figures.

    python tools/paper/run.py [--only NAME ...] [--budget MINUTES] --models DIR --data DIR

Each experiment is a list of cells; a cell is one measurement with its settings and its seed. After
each cell tools/measurements/paper/NAME.json is written, with the commands, the seconds, the device
and the versions. A cell that is in the file with the same settings and the same recipe is not
measured again, so the same command continues after a stop, and a run that was interrupted is
resumed. `python tools/paper/tables.py` then writes the tables of docs/paper.md. Commands are
relative to the folder of --work: `cd WORK && qlora train recipes/paper/sst2.yaml` repeats one.

Models and rows: tools/paper/paper_data.py names the packages and folders. Cells without their model
or rows are reported, and the others are measured. BLEU and chrF need the package `sacrebleu`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from bench_inference import where
from experiments import EXPERIMENTS
from paper_cells import (
    MEASUREMENTS,
    ROOT,
    Cell,
    CellError,
    Experiment,
    Workspace,
    find_cell,
    recipe_digest,
)
from paper_data import Places, prepare

from qlora_cli.files.atomic import write_json


class Report:
    """The JSON file of an experiment: one entry for each measured cell."""

    def __init__(self, file: Path, experiment: Experiment) -> None:
        self.file = file
        self.content: dict[str, Any] = {"experiment": experiment.name, "cells": []}
        if file.exists():
            self.content = json.loads(file.read_text())

    def measured(self, cell: Cell) -> Mapping[str, Any] | None:
        """Return the entry of a cell that was measured with the same settings and recipe."""
        entry = find_cell(self.content["cells"], cell)
        if entry is None or entry["settings"] != list(cell.settings):
            return None
        recipes = entry["recipes"]
        return entry if all(recipe_digest(name) == recipes[name] for name in recipes) else None

    def add(self, cell: Cell, entry: Mapping[str, Any]) -> None:
        """Write the file with this entry, which replaces that of other settings."""
        old = find_cell(self.content["cells"], cell)
        kept = [other for other in self.content["cells"] if other is not old]
        self.content["cells"] = [*kept, entry]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.content)

    def minutes(self, cell: Cell) -> float:
        """Return how long a cell takes about: as with other seeds, else as written in it."""
        taken = [
            entry["seconds"]
            for entry in self.content["cells"]
            if entry["name"] == cell.name and not entry["resumed"]
        ]
        return fmean(taken) / 60 if taken else cell.minutes


def measure_cell(experiment: Experiment, cell: Cell, space: Workspace) -> dict[str, Any]:
    """Measure a cell and return its entry. Raises CellError if it fails."""
    space.commands.clear()
    space.recipes.clear()
    space.is_resumed = False
    began = time.perf_counter()
    result = experiment.measure(cell, space)
    return {
        "name": cell.name,
        "seed": cell.seed,
        "settings": list(cell.settings),
        "commands": list(space.commands),
        "recipes": dict(space.recipes),
        "result": result,
        "seconds": round(time.perf_counter() - began, 1),
        "resumed": space.is_resumed,
        "where": where(),
    }


def note_versions(entry: Mapping[str, Any]) -> str:
    """Return how the versions of a measured cell differ from the present ones, or nothing."""
    old, new = entry["where"]["versions"], where()["versions"]
    changed = [
        f"{name} {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]
    ]
    return f"; measured with {'; '.join(changed)}" if changed else ""


def run(options: argparse.Namespace) -> int:
    """Measure the cells that are missing, and return the exit code."""
    began, failed = time.perf_counter(), False
    space = Workspace(options.work.resolve(), options.small)
    places = Places(options.data, options.models)
    for experiment in _chosen(options):
        report = Report(options.out / experiment.file_name, experiment)
        try:
            prepare(experiment.needs, places, space)
        except CellError as error:
            _note(f"{experiment.name}: not measured: {error}")
            failed = True
            continue
        for cell in experiment.small if options.small else experiment.cells:
            title = f"{experiment.name}: {cell.name}, seed {cell.seed}"
            if entry := report.measured(cell):
                _note(f"{title}: is in {report.file.name}{note_versions(entry)}")
                continue
            spent, needed = (time.perf_counter() - began) / 60, report.minutes(cell)
            if options.budget is not None and spent + needed > options.budget:
                _note(f"{title}: stopped: about {needed:.1f} min do not fit the budget")
                return 1 if failed else 0
            _note(f"{title}: about {needed:.1f} min")
            try:
                report.add(cell, measure_cell(experiment, cell, space))
            except CellError as error:
                _note(f"{title}: failed: {error}")
                failed = True
            except KeyboardInterrupt:
                _note(f"{title}: interrupted; the same command continues")
                return 130
    return 1 if failed else 0


def _chosen(options: argparse.Namespace) -> Iterator[Experiment]:
    yield from (e for e in EXPERIMENTS if not options.only or e.name in options.only)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    shared = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--only", nargs="+", choices=names, help="these experiments only")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="stop before a cell that would end later"
    )
    parser.add_argument("--small", action="store_true", help="a few rows and steps, as in tests")
    parser.add_argument(
        "--models", type=Path, help="folder of the models  [default: models in --data]"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=shared / "data",
        help="folder of the rows  [default: $QLORA_SHARED/data]",
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "paper", help="folder of the runs"
    )
    parser.add_argument("--out", type=Path, default=MEASUREMENTS, help="folder of the JSON files")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; 0 is torch's choice  [default: 1]"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Parse the options and run the experiments."""
    options = _parser().parse_args(words)
    if options.small and options.out == MEASUREMENTS:
        raise SystemExit("--small: name another folder with --out; its figures are no measurements")
    if options.threads:
        torch.set_num_threads(options.threads)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
