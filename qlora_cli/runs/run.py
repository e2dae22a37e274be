"""A training run that is read from its folder: each file is read and checked once per command."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_cli.adapters.peft_file import AdapterFile, open_adapter
from qlora_cli.adapters.registry import method_of
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.files.checksums import damage, damage_of_folder
from qlora_cli.files.paths import user_path
from qlora_cli.files.source import config_digest, fingerprint
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.section import Section
from qlora_cli.runs.layout import ADAPTER, WEIGHTS, RunFolder, checkpoint_step
from qlora_cli.runs.metrics import best_evaluation, read_evaluations


class Run:
    """A run's recipe, base, adapter and status, read from its folder at first use and kept.

    A command makes one `Run` and passes it on, so that `run.json` is read once and the base is
    fingerprinted once. A `Run` does not notice later changes on disk: create a new one after
    writing `run.json`. Creating a `Run` reads nothing; each attribute raises if it cannot be read.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        """path: the run's folder, or one of its checkpoints, whose step is then `step`.

        step: use the weights of this step's checkpoint; None for those of `trained_step`.
        """
        found = checkpoint_step(path)
        self.folder = RunFolder(path if found is None else path.parent.parent)
        self.step = found if step is None else step

    @classmethod
    def find(cls, where: str | Path) -> Run | None:
        """Return the run in the folder `where`, or None if there is no `run.json` in it.

        where: a path that the user wrote, of a run or of one of its checkpoints; `~` is expanded.
        """
        run = cls(user_path(where))
        return run if run.folder.run_json.is_file() else None

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`. Raises UsageError if it is missing or damaged."""
        return self.folder.read()

    def require(self, key: str) -> Any:
        """Return the value of `key` in `run.json`. Raises UsageError if there is no such key."""
        if self.record.get(key) is None:
            raise UsageError(f"damaged: it has no {key}", where=str(self.folder.run_json))
        return self.record[key]

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe that the run was trained with. Raises UsageError if it is invalid."""
        recipe = self.require("recipe")
        try:
            valid = Recipe.model_validate(_without_defaults(recipe, Recipe))
        except (ValueError, AttributeError) as fault:
            raise UsageError(f"damaged recipe: {fault}", where=str(self.folder.run_json)) from fault
        if valid.base.importance is None:
            return valid
        # The run has the file; its folder may have been moved.
        return with_settings(valid, "base", importance=str(self.folder.importance))

    @property
    def is_full_fine_tuning(self) -> bool:
        """Whether the run trained all weights and so has no adapter."""
        return not method_of(self.recipe.adapter).freezes_base

    @cached_property
    def base_folder(self) -> Path:
        """The folder of the base that the run was trained on.

        Raises ModelError if the folder is gone, or if the run has an adapter and the base's weights
        have changed since training.
        """
        folder = Path(self.require("base_folder"))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"the base that the run was trained on is not at {folder} any more",
                where=str(self.folder.run_json),
                hint="move it back, or set base_folder in run.json to its new path",
            )
        if not self.is_full_fine_tuning:
            self.check_base(folder)
        return folder

    def check_base(self, folder: Path) -> None:
        """Compare the base in `folder` with the base that the run was begun with.

        Runs of older versions recorded less of it. Raises ModelError if weights or config differ.
        """
        config = self.record.get("base_config")
        if config is not None and config != config_digest(folder):
            raise ModelError(
                f"{folder / 'config.json'} is not as it was when the run was trained",
                where=str(self.folder.run_json),
                hint="restore the original config.json",
            )
        stored = self.record.get("base_fingerprint")
        if stored is not None and stored != fingerprint(folder, stored):
            raise ModelError(
                f"the weights in {folder} are not those that the run was trained on",
                where=str(self.folder.run_json),
                hint="restore the original weights; an adapter works only on the base that it was "
                "trained on",
            )

    @cached_property
    def adapter_file(self) -> AdapterFile:
        """The trained adapter of `trained_step`, checked but not read into memory.

        Raises UsageError if the run has no adapter or no checkpoint yet, ModelError if the
        adapter's files are damaged.
        """
        if self.is_full_fine_tuning:
            raise UsageError(
                f"{self.path} is a full fine-tuning; it has no adapter",
                hint="use it as a model: `qlora generate RUN`",
            )
        return open_adapter(self._trained(ADAPTER))

    @cached_property
    def trained_weights(self) -> Path:
        """The folder of the model that full fine-tuning wrote, of `trained_step`.

        Raises UsageError if the run has no checkpoint yet, ModelError if its files are damaged.
        """
        return self._trained(WEIGHTS)

    @property
    def frozen_or_trained_weights(self) -> Path:
        """The folder of the weights under the adapter: the base's, or those of full fine-tuning."""
        return self.trained_weights if self.is_full_fine_tuning else self.base_folder

    @cached_property
    def trained_step(self) -> int | None:
        """The step of the checkpoint whose weights are used; None for those of the finished run.

        Without a requested step, a run that is not finished uses the checkpoint with the best
        evaluation, if `train.keep_best` is set and it was evaluated, else the last checkpoint.

        Raises UsageError if there is no checkpoint, or none of the requested step.
        """
        name = WEIGHTS if self.is_full_fine_tuning else ADAPTER
        if self.step is not None:
            return self._require_checkpoint(self.step, name)
        exported = (self.path / name).is_dir()
        steps = [step for step in self.folder.steps() if self._has_weights(step, name)]
        if exported and (self.record.get("status") == "done" or not steps):
            return None
        if not steps:
            raise UsageError(
                f"{self.path} has no trained weights yet; its status is "
                f"{self.record.get('status')}",
                hint="continue it with `qlora train --resume` up to its first checkpoint",
            )
        evaluations = read_evaluations(self.folder.metrics, self.recipe.best_metric)
        done = [item for item in evaluations if item.step in steps]
        best = best_evaluation(done) if self.recipe.train.keep_best else None
        return best.step if best is not None else steps[-1]

    def describe_weights(self) -> str | None:
        """Return which checkpoint is used, for a note; None for the weights of a finished run.

        Raises UsageError as `trained_step` does.
        """
        step = self.trained_step
        if step is None:
            return None
        evaluations = read_evaluations(self.folder.metrics)
        losses = {evaluation.step: evaluation.loss for evaluation in evaluations}
        loss = f", held-out loss {losses[step]:.3f}" if step in losses else ""
        status = self.record.get("status")
        return (
            f"{self.path}: using the checkpoint of step {step} of {self.record.get('steps')}{loss} "
            f"(the run's status is {status})"
        )

    def exported_damage(self) -> list[str]:
        """Return one line per file of the exported weights that is missing or not as written.

        Runs of older versions have no checksums; only a missing folder is found in them.
        """
        name = WEIGHTS if self.is_full_fine_tuning else ADAPTER
        if not (self.path / name).is_dir():
            return [f"the folder {name} is missing"]
        return damage(self.path, self.record.get("checksums") or {})

    def _trained(self, name: str) -> Path:
        """Return the folder `name` of the run, or of the checkpoint that is used instead.

        Raises ModelError if a file in it is not as it was written.
        """
        step = self.trained_step
        folder = self.path if step is None else self.folder.checkpoint(step)
        if step is None:
            found, hint = self.exported_damage(), "`qlora train --resume` writes it again"
        else:
            found, hint = damage_of_folder(folder, f"{name}/"), "use another checkpoint"
        if found:
            raise ModelError(f"damaged: {found[0]}", where=str(folder / name), hint=hint)
        return folder / name

    def _has_weights(self, step: int, name: str) -> bool:
        return (self.folder.checkpoint(step) / name).is_dir()

    def _require_checkpoint(self, step: int, name: str) -> int:
        """Return `step`. Raises UsageError if it has no checkpoint with the folder `name`."""
        steps = self.folder.steps()
        if step in steps and self._has_weights(step, name):
            return step
        if step in steps:
            raise UsageError(
                f"the checkpoint of step {step} was written by an older version, and can only be "
                "resumed",
                where=str(self.folder.checkpoint(step)),
                hint="use a later checkpoint, or finish the run with `qlora train --resume`",
            )
        listed = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
        raise UsageError(
            f"{self.path} has no checkpoint of step {step}; {listed}",
            hint="name one of these, or leave the step out",
        )


def adapter_at(where: Path) -> AdapterFile:
    """Return the adapter of a run, of a run's checkpoint or of a folder in PEFT's format.

    Raises InputError if there is none or it is damaged.
    """
    run = Run.find(where)
    return run.adapter_file if run is not None else open_adapter(user_path(where))


def _without_defaults(content: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """Return the settings of a stored recipe that differ from their defaults.

    `run.json` contains all settings, also those that do not apply to the run's method. Validation
    would refuse these as if the user had set them.
    """
    kept: dict[str, Any] = {}
    for key, value in content.items():
        field = section.fields_by_key().get(key)
        inner = field.annotation if field is not None else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, Section):
            kept[key] = _without_defaults(value, inner)
        elif field is None or field.is_required() or value != field.default:
            kept[key] = value
    return kept
