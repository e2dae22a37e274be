"""The result of `qlora sweep`: every run, and the mean and the spread of each cell. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from qlora_cli.jobs.results import Result

DONE, DOES_NOT_FIT, FAILED, PENDING = "done", "does not fit", "failed", "pending"
"""The states of a run."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    name: of its folder. settings: dotted key -> value of the settings that differ between cells.
    overrides: with these `qlora train` does the same run alone. reason: why it is not done; None if
    it is. metrics: name -> value; empty if it is not done.
    """

    name: str
    settings: Mapping[str, str]
    seed: int
    overrides: tuple[str, ...]
    status: str
    reason: str | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class SweepCell:
    """The runs of one combination of settings.

    seeds: of the runs that are done. mean, spread: metric -> mean and sample standard deviation
    over these; no spread for a single run. status: of the runs, the first one that is not done.
    is_best: it has the best mean of the metric that compares cells.
    """

    settings: Mapping[str, str]
    seeds: tuple[int, ...]
    status: str
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    is_best: bool = False


@dataclass(frozen=True)
class RefusedCell:
    """A combination of settings that the recipe does not allow, and the reason."""

    settings: Mapping[str, str]
    reason: str


@dataclass(frozen=True)
class SweepResult(Result):
    """Result of `qlora sweep`, the content of sweep.json but for `plot`.

    folder: of the sweep; each run is a folder in it. metric: compares the cells. higher_is_better:
    of that metric. axes: dotted key -> values in the order of the command line. table: one entry
    for each cell. plot: the figure of the table; None if no run is done.
    """

    folder: Path
    recipe_file: Path
    metric: str
    higher_is_better: bool
    axes: Mapping[str, tuple[str, ...]]
    runs: tuple[SweepRun, ...]
    table: tuple[SweepCell, ...]
    refused: tuple[RefusedCell, ...]
    plot: Path | None = None

    @property
    def best(self) -> SweepCell | None:
        """The cell with the best mean; None if no run is done."""
        return next((cell for cell in self.table if cell.is_best), None)


def make_table(
    runs: Sequence[SweepRun], metric: str, higher_is_better: bool
) -> tuple[SweepCell, ...]:
    """Return the cells of the runs in their order, the best one marked."""
    cells = list(_cells(runs))
    sign = -1 if higher_is_better else 1
    compared = [cell for cell in cells if metric in cell.mean]
    best = min(compared, key=lambda cell: sign * cell.mean[metric], default=None)
    return tuple(_marked(cell) if cell is best else cell for cell in cells)


def _cells(runs: Sequence[SweepRun]) -> Iterator[SweepCell]:
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(repr(run.settings), []).append(run)
    for group in groups.values():
        done = [run for run in group if run.status == DONE]
        names = list(done[0].metrics) if done else []
        values = {
            name: [run.metrics[name] for run in done if name in run.metrics] for name in names
        }
        yield SweepCell(
            settings=group[0].settings,
            seeds=tuple(run.seed for run in done),
            status=next((run.status for run in group if run.status != DONE), DONE),
            mean={name: mean(numbers) for name, numbers in values.items()},
            spread={name: stdev(numbers) for name, numbers in values.items() if len(numbers) > 1},
        )


def _marked(cell: SweepCell) -> SweepCell:
    return SweepCell(**vars(cell) | {"is_best": True})
