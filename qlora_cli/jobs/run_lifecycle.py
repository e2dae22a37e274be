"""Starts, resumes and ends the run folder of a training job."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.files.atomic import atomic_file, report_write_errors
from qlora_cli.jobs import record, report
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.jobs.results import TrainResult
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run


def finished_result(earlier: Run, description: dict[str, Any]) -> TrainResult | None:
    """Return the stored result of a run that is finished, None if steps are left to do.

    earlier: the run as it is on disk. description: of the job now, from `record.describe_run`.
    Raises UsageError if the recipe has changed, ModelError if the base has changed.
    """
    if earlier.require("status") != "done" or not earlier.folder.memory_json.is_file():
        return None
    _check_unchanged(earlier, description)
    ledger = report.ledger_of(earlier)
    return TrainResult(**earlier.require("result") | {"run": earlier.path, "ledger": ledger})


def open_or_resume(
    job: TrainingJob, description: dict[str, Any], earlier: Run | None
) -> Path | None:
    """Write run.json and return the checkpoint to resume from, None if there is none.

    description: of the job, from `record.describe_run`. earlier: the run to resume; None creates a
    new folder. Raises UsageError if the recipe has changed or a new run's folder exists, ModelError
    if the base has changed.
    """
    if earlier is None:
        job.run.create()
        job.run.write(description)
        return None
    _check_unchanged(earlier, description)
    job.run.write(earlier.record | description)
    steps = job.run.steps()
    _truncate_metrics(job.run, steps[-1] if steps else 0)
    return job.run.checkpoint(steps[-1]) if steps else None


def record_stop(run: RunFolder, status: str, resumed: bool) -> None:
    """Write `status` to run.json after an error. Remove a new run that has not done a step.

    resumed: whether this process resumed the run. A folder that existed before is never removed.
    """
    has_metrics = run.metrics.exists() and run.metrics.stat().st_size > 0
    has_progress = bool(run.steps()) or has_metrics
    # The error that ends the job is more useful than one about run.json.
    with suppress(OSError, QloraError):
        if has_progress or resumed:
            record.set_status(run, status)
        else:
            run.discard()


def _check_unchanged(earlier: Run, description: dict[str, Any]) -> None:
    """Raise UsageError if the recipe differs from the stored one, ModelError if the base does."""
    earlier.check_fingerprint(description["base_fingerprint"])
    # Older versions stored the paths of data files as they were written in the recipe.
    stored = _flatten(record.with_absolute_paths(earlier.require("recipe")))
    current = _flatten(description["recipe"])
    keys = sorted(stored.keys() | current.keys())
    changed = [key for key in keys if stored.get(key) != current.get(key)]
    if changed:
        raise UsageError(
            "the recipe has changed since this run began: "
            + ", ".join(
                f"{key} was {stored.get(key)!r}, is {current.get(key)!r}" for key in changed
            ),
            where=str(earlier.folder.run_json),
            hint="resume with the stored values, or start a new run with output=...",
        )


def _flatten(recipe: object, prefix: str = "") -> dict[str, object]:
    """Return dotted key -> value of a nested dictionary."""
    if not isinstance(recipe, dict):
        return {prefix.rstrip("."): recipe}
    return {k: v for key in recipe for k, v in _flatten(recipe[key], f"{prefix}{key}.").items()}


def _truncate_metrics(run: RunFolder, step: int) -> None:
    """Remove the metrics of steps after `step`, which are done again. Each line is one step."""
    if run.metrics.exists():
        lines = run.metrics.read_text().splitlines(keepends=True)[:step]
        with report_write_errors("metrics.jsonl", run.metrics), atomic_file(run.metrics) as beside:
            beside.write_text("".join(lines))
