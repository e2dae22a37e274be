"""`qlora sweep`: train a grid of settings and seeds, one run after the other, on one base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qlora_cli.data.collate import largest_batch
from qlora_cli.errors import DoesNotFit, InputError, Interrupted, QloraError, UsageError
from qlora_cli.events import SweepObserver
from qlora_cli.files.atomic import remove_partial_files, report_write_errors, write_json
from qlora_cli.files.lock import locked_file
from qlora_cli.jobs import train
from qlora_cli.jobs.prepare import prepare
from qlora_cli.jobs.results import TrainResult
from qlora_cli.jobs.sweep_notes import EachNoteOnce
from qlora_cli.jobs.sweep_results import (
    DOES_NOT_FIT,
    DONE,
    FAILED,
    PENDING,
    RefusedCell,
    SweepResult,
    SweepRun,
    make_table,
)
from qlora_cli.memory.device import inspect_device
from qlora_cli.models.shared_base import SharedBase
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.planner import num_segments
from qlora_cli.plan.settle import least_memory
from qlora_cli.recipe.grid import Grid, GridRun
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import EVAL_LOSS, evaluation_metrics

SWEEP_JSON = "sweep.json"
"""File in the sweep's folder: the result so far. It is written again after each run."""
_LOCK = ".lock"
_MIN_TOKENS = 8
"""Length of the sequence with which the settings of each cell are checked."""


def run(
    grid: Grid,
    *,
    recipe_path: Path,
    resume: bool,
    observer: SweepObserver,
    allow: Collection[str] = (),
) -> SweepResult:
    """Train every run of the grid and return the result.

    resume: continue the sweep in the grid's folder; runs that are done are not repeated. allow: as
    of `train.run`. Runs that do not fit the device or fail are reported in the result, and the
    others are trained. Raises InputError if a cell, the base or the data cannot be used, before any
    training if possible; Interrupted after Ctrl-C; DoesNotFit if no run fits; QloraError if all
    fail or a file cannot be written.
    """
    with _locked(grid.folder, resume):
        sweep = _Sweep(grid, recipe_path, EachNoteOnce(observer), allow)
        sweep.check_cells()
        for number, item in enumerate(grid.runs, 1):
            observer.begin_run(number, len(grid.runs), item.name)
            try:
                sweep.train(item)
            except (Interrupted, KeyboardInterrupt) as stop:
                raise Interrupted(
                    f"stopped in run {number} of {len(grid.runs)}, {item.name}",
                    where=str(grid.folder),
                    hint="continue the sweep with --resume; runs that are done are not repeated",
                ) from stop
            sweep.write()
        return sweep.result_or_error()


@contextmanager
def _locked(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the lock of the sweep's folder, which is created for a new sweep.

    A folder without a run is removed at the end. Raises UsageError if the folder contains files of
    something else, if there is no sweep to resume, or if another process uses it.
    """
    if not resume:
        RunFolder(folder).create()
    elif not (folder / SWEEP_JSON).is_file():
        raise UsageError(f"{folder} is not a sweep's folder", where="--resume")
    with ExitStack() as stack:
        with report_write_errors("the lock of the sweep", folder / _LOCK):
            is_free = stack.enter_context(locked_file(folder / _LOCK, wait=False))
        if not is_free:
            raise UsageError(f"{folder} is in use: another process trains this sweep now")
        remove_partial_files(folder / SWEEP_JSON)
        try:
            yield
        finally:
            if not any(path.is_dir() for path in folder.iterdir()):
                (folder / SWEEP_JSON).unlink(missing_ok=True)
                RunFolder(folder).discard()


@dataclass
class _Sweep:
    """A sweep while it runs.

    parameters: settings of a cell, as text -> number of trained parameters. outcomes: name of a run
    -> its outcome.
    """

    grid: Grid
    recipe_path: Path
    observer: EachNoteOnce
    allow: Collection[str]
    base: SharedBase = field(default_factory=SharedBase)
    parameters: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, SweepRun] = field(default_factory=dict)

    def check_cells(self) -> None:
        """Check each cell by a dry run of a short sequence, and write sweep.json.

        So an unknown target is found before anything is trained. Raises InputError.
        """
        cells = {repr(item.settings): item for item in self.grid.runs}
        self.observer.stage("check the cells", len(cells))
        for done, (key, item) in enumerate(cells.items(), 1):
            prepared = prepare(item.recipe, inspect_device())
            vocabulary, segments = prepared.config.vocab_size, num_segments(item.recipe)
            batch = largest_batch(_MIN_TOKENS, 1, vocabulary, segments=segments)
            recipe = least_memory(prepared.recipe)
            plan = dry_run(recipe, prepared.config, prepared.profile, [batch], [])
            self.parameters[key] = plan.trainable_parameters
            self.observer.advance(done)
        for line in self.grid.dropped:
            self.observer.note(line)
        for item in self.grid.runs:
            self._record(item, PENDING, "not trained yet")
        self.write()

    def train(self, item: GridRun) -> None:
        """Train one run, or resume it, and store its outcome.

        Raises InputError and Interrupted. Other errors are stored as the outcome.
        """
        folder = RunFolder(Path(item.recipe.output))
        try:
            result = train.run(
                item.recipe,
                recipe_path=self.recipe_path,
                resume=folder.run_json.is_file(),
                observer=self.observer,
                allow=self.allow,
                build_model=self.base.build,
            )
        except (InputError, Interrupted):
            raise
        except DoesNotFit as error:
            self._skip(item, DOES_NOT_FIT, error)
        except QloraError as error:
            self._skip(item, FAILED, error)
        else:
            self._record(item, DONE, None, self._metrics(item, result))

    def _skip(self, item: GridRun, status: str, error: QloraError) -> None:
        """Store that a run is not done, and report it."""
        self.observer.note(f"warning: {item.name} {status}: {error.what}")
        self._record(item, status, error.what)

    def _record(
        self, item: GridRun, status: str, reason: str | None, metrics: Mapping[str, float] = {}
    ) -> None:
        self.outcomes[item.name] = SweepRun(
            item.name, item.settings, item.seed, item.overrides, status, reason, metrics
        )

    def _metrics(self, item: GridRun, result: TrainResult) -> dict[str, float]:
        """Return the figures of a run that is done; those of the held-out set come first."""
        folder = RunFolder(result.run)
        metrics: dict[str, float] = {}
        if result.best_step is not None:
            metrics |= evaluation_metrics(folder.metrics, result.best_step)
        return metrics | {
            "train_loss": result.train_loss,
            "trainable_parameters": self.parameters[repr(item.settings)],
            "tokens_per_second": result.tokens_per_second,
            "peak_bytes": result.ledger.measured_peak_bytes,
        }

    def write(self) -> None:
        """Write sweep.json. Raises QloraError if that fails."""
        file = self.grid.folder / SWEEP_JSON
        content = self._result().to_dict()
        del content["plot"]  # The figure is drawn after the sweep.
        with report_write_errors("the result of the sweep", file):
            write_json(file, content)

    def _result(self) -> SweepResult:
        runs = tuple(self.outcomes[item.name] for item in self.grid.runs)
        metric, higher_is_better = self._metric(runs)
        return SweepResult(
            folder=self.grid.folder,
            recipe_file=self.recipe_path,
            metric=metric,
            higher_is_better=higher_is_better,
            axes={axis.key: axis.values for axis in self.grid.axes},
            runs=runs,
            table=make_table(runs, metric, higher_is_better),
            refused=tuple(RefusedCell(*refused) for refused in self.grid.refused),
        )

    def _metric(self, runs: tuple[SweepRun, ...]) -> tuple[str, bool]:
        """Return the metric that compares the cells, and whether its highest value is the best."""
        chosen = {item.recipe.train.keep_best for item in self.grid.runs}
        named = next(iter(chosen)) if len(chosen) == 1 else None
        if isinstance(named, str):
            return named, True
        measured = [run.metrics for run in runs if run.status == DONE]
        return (EVAL_LOSS if all(EVAL_LOSS in m for m in measured) else "train_loss"), False

    def result_or_error(self) -> SweepResult:
        """Return the result. Raises DoesNotFit or QloraError if no run is done."""
        result = self._result()
        if any(run.status == DONE for run in result.runs):
            return result
        first = result.runs[0]
        error = DoesNotFit if first.status == DOES_NOT_FIT else QloraError
        raise error(f"no run of the sweep is done; the first one: {first.reason}")
