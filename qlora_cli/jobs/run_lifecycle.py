"""Starts, resumes and ends the run folder of a training job."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.events import Observer
from qlora_cli.jobs import record, report
from qlora_cli.jobs.prepare import TrainingJob
from qlora_cli.jobs.results import TrainResult
from qlora_cli.recipe import activations
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps, remove_lines_after
from qlora_cli.runs.resume import last_good_step
from qlora_cli.runs.run import Run
from qlora_cli.train.schedule import learning_rate

_LENGTH = ("train.epochs", "train.steps")
"""Settings that may change on a resume if the run becomes longer."""
_CHANGEABLE = (
    "output",
    "base.cache",
    "base.residency",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.patience",
    activations.KEY,
)
"""Settings that may change on a resume, because they do not change the steps that were done."""
_PLACES = {
    "data_digest": ("data.train", "data.eval"),
    "base_fingerprint": ("model.name", "model.revision"),
}
"""Key of run.json that identifies a content -> settings that name its place, which may change."""


def finished_result(
    earlier: Run, description: dict[str, Any], observer: Observer
) -> TrainResult | None:
    """Return the stored result of a run that is finished, None if steps are left to do.

    earlier: the run as it is on disk. description: of the job now, from `record.describe_run`. A
    finished run has steps left if `train.epochs` or `train.steps` has been raised, or if it stopped
    early and `train.patience` has changed. If its trained weights are missing or damaged, they have
    to be written again, which `observer` receives a note about.
    Raises UsageError if another setting has changed, ModelError if the base has changed.
    """
    if earlier.require("status") != "done" or not earlier.folder.memory_json.is_file():
        return None
    changed = _check_unchanged(earlier, description)
    result = earlier.require("result")
    stopped_early = result["steps"] < _steps_of(earlier)
    if description["steps"] > _steps_of(earlier) or (stopped_early and "train.patience" in changed):
        return None
    if found := earlier.exported_damage():
        observer.note(f"{found[0]}; the trained weights are written again from the last checkpoint")
        return None
    ledger = report.ledger_of(earlier)
    stored = {field.name: result.get(field.name) for field in fields(TrainResult)}
    if stored["train_loss"] is None or stored["tokens_per_second"] is None:
        what = "damaged: the result has no training loss or no speed"
        raise UsageError(what, where=str(earlier.folder.run_json))
    return TrainResult(**stored | {"run": earlier.path, "ledger": ledger})


def describe_extension(earlier: Run, job: TrainingJob) -> str | None:
    """Return how the learning rate continues if the job has more steps than the earlier run had.

    Returns None if it has not. earlier: the run as it was before this process. Damaged checkpoints
    must have been set aside, which `open_or_resume` does.
    """
    before, steps, done = _steps_of(earlier), job.steps, earlier.folder.steps()
    if steps <= before or not done:
        return None
    train, last = job.prepared.recipe.train, done[-1]
    ended = learning_rate(earlier.recipe.train, last - 1, before)
    continues = learning_rate(train, last, steps)
    return (
        f"extended from {before:,} to {steps:,} steps. From step {last + 1:,} the learning rate "
        f"follows the {train.schedule} schedule of {steps:,} steps: it continues with "
        f"{continues:.2e}; at step {last:,} it was {ended:.2e}. So the result differs from a run "
        f"that has {steps:,} steps from the start"
    )


def _steps_of(earlier: Run) -> int:
    """Return the number of steps that the run was to have."""
    steps: int = earlier.record.get("steps") or earlier.require("result")["steps"]
    return steps


def open_or_resume(
    job: TrainingJob, description: dict[str, Any], earlier: Run | None, observer: Observer
) -> Path | None:
    """Write run.json and return the checkpoint to resume from, None if there is none.

    description: of the job, from `record.describe_run`. earlier: the run to resume; None for a new
    one. observer: receives a note per damaged checkpoint, which is not used. Raises UsageError if
    the recipe has changed, ModelError if the base has changed or all checkpoints are damaged.
    """
    if earlier is None:
        job.run.write(description)
        return None
    _check_unchanged(earlier, description)
    _check_data(earlier, job, observer)
    _note_other_versions(earlier, description, observer)
    job.run.write(earlier.record | description | {"versions": earlier.record.get("versions")})
    good = last_good_step(job.run, observer.note)
    last = good or 0
    # A process that only has to save evaluates again, so that its report has this phase.
    remove_lines_after(job.run.metrics, last, keep_evaluation=last < job.steps)
    return job.run.checkpoint(last) if good is not None else None


def record_stop(run: RunFolder, status: str, resumed: bool) -> None:
    """Write `status` to run.json after an error. Remove a new run that has not done a step.

    resumed: whether this process resumed the run. A folder that existed before is never removed.
    """
    has_progress = bool(run.steps()) or bool(read_steps(run.metrics))
    # The error that ends the job is more useful than one about run.json.
    with suppress(OSError, QloraError):
        if has_progress or resumed:
            record.set_status(run, status)
        else:
            run.discard()


def _check_unchanged(earlier: Run, description: dict[str, Any]) -> list[str]:
    """Return the settings that differ from the stored recipe, all of which may change.

    Raises UsageError if another setting differs, ModelError if the base does.
    """
    earlier.check_base(Path(description["base_folder"]))
    # Older versions stored the paths of data files as they were written in the recipe. Settings
    # that a run of an older version does not have are at their defaults in it.
    stored = _flatten(record.with_absolute_paths(earlier.recipe.model_dump(mode="json")))
    current = _flatten(description["recipe"])
    keys = sorted(stored.keys() | current.keys())
    changed = [key for key in keys if stored.get(key) != current.get(key)]
    before = earlier.record.get("steps")
    is_longer = before is not None and description["steps"] > before
    allowed = [*_CHANGEABLE, *(_LENGTH if is_longer else ())]
    allowed += [key for record, keys in _PLACES.items() if record in earlier.record for key in keys]
    # Older versions did not have it, so it is chosen when their runs are resumed.
    allowed += ["train.loss_chunk"] if stored.get("train.loss_chunk") == "auto" else []
    refused = [key for key in changed if key not in allowed]
    if refused:
        raise UsageError(
            "the recipe has changed since this run began: "
            + ", ".join(
                f"{key} was {stored.get(key)!r}, is {current.get(key)!r}" for key in refused
            ),
            where=str(earlier.folder.run_json),
            hint="resume with the stored values, or start a new run with output=...; a run can be "
            "extended by more epochs or steps",
        )
    return changed


def _check_data(earlier: Run, job: TrainingJob, observer: Observer) -> None:
    """Raise UsageError if the tokens of the rows are not those that the run was trained on.

    A chat template that writes today's date changes them every day; then they are only reported.
    """
    stored = earlier.record.get("data_digest")
    if stored is None or stored == job.data_digest:
        return
    what = "the rows, or the tokens that they become, have changed since this run began"
    if "strftime_now" in str(getattr(job.prepared.tokenizer, "chat_template", None)):
        observer.note(f"warning: {what}; the chat template writes today's date")
        return
    raise UsageError(
        what,
        where=str(earlier.folder.run_json),
        hint="restore the data files, the tokenizer and the chat template, or start a new run",
    )


def _note_other_versions(earlier: Run, description: dict[str, Any], observer: Observer) -> None:
    """Report libraries that have another version than when the run began."""
    before, now = earlier.record.get("versions") or {}, description["versions"]
    names = [name for name in before if now.get(name) != before[name]]
    changed = [f"{name} {before[name]} -> {now.get(name)}" for name in names]
    if changed:
        observer.note(
            f"warning: versions have changed since the run began ({', '.join(changed)}); the "
            "result may differ from that of a run without a break"
        )


def _flatten(recipe: object, prefix: str = "") -> dict[str, object]:
    """Return dotted key -> value of a nested dictionary."""
    if not isinstance(recipe, dict):
        return {prefix.rstrip("."): recipe}
    return {k: v for key in recipe for k, v in _flatten(recipe[key], f"{prefix}{key}.").items()}
