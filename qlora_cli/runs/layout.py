"""The files in a run's folder, and the operations on the folder itself.

- run.json          resolved recipe, automatic choices with reasons, versions, device, status
- adapter/          adapter_config.json + adapter_model.safetensors, in PEFT's format; prefix/ in it
                    with the same two files if there is a prefix (`adapter.prefix`)
- weights/          the trained model after full fine-tuning, instead of adapter/
- checkpoints/      step-000200/ ...; each folder is complete or absent, and contains what is needed
                    to resume and the adapter/ or weights/ of its step
- constants.safetensors  log-probabilities under the reference model, of `task: preference`
- importance.safetensors  mean squares of the inputs of linears, of `base.scales: measured`
- memory.json       memory by phase and category
- timeline.json     memory over time, of the phases that were tracked
- metrics.jsonl     one line per optimizer step, one per evaluation (`runs/metrics.py`)
- report.html       self-contained report
- memory.png        the memory figures of the report as one image
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from qlora_cli.errors import UsageError
from qlora_cli.files.atomic import (
    partial_files,
    read_json,
    remove_partial_files,
    report_write_errors,
    write_json,
)
from qlora_cli.files.lock import locked_file
from qlora_cli.files.paths import user_path
from qlora_cli.runs.record import RunRecord

ADAPTER = "adapter"
WEIGHTS = "weights"
"""Name of the folder with the trained weights, in a run and in each of its checkpoints."""
_CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_STEP = re.compile(r"step-(\d{6,})")


def checkpoint_step(path: Path) -> int | None:
    """Return the step of the checkpoint that `path` names; None if it is not a checkpoint's path.

    The checkpoint need not exist, but its run must.
    """
    match = _STEP.fullmatch(path.name)
    if match is None or path.parent.name != _CHECKPOINTS:
        return None
    return int(match[1]) if (path.parent.parent / "run.json").is_file() else None


class RunFolder:
    """The paths of a run. Its methods read and write `run.json` and create or remove the folder.

    Making a `RunFolder` does not access the disk. To read a run, use `Run`, which reads once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_json(self) -> Path:
        """The run's recipe, choices, versions, device and status."""
        return self.path / "run.json"

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, in PEFT's format."""
        return self.path / ADAPTER

    @property
    def weights(self) -> Path:
        """The folder of the trained model after full fine-tuning."""
        return self.path / WEIGHTS

    @property
    def checkpoints(self) -> Path:
        """The folder that contains one folder per checkpoint."""
        return self.path / _CHECKPOINTS

    @property
    def constants(self) -> Path:
        """What a task has computed for each row before the first step."""
        return self.path / "constants.safetensors"

    @property
    def importance(self) -> Path:
        """The mean squares of the inputs of linears; only of `base.scales: measured`."""
        return self.path / "importance.safetensors"

    @property
    def memory_json(self) -> Path:
        """The ledger: memory by phase and category."""
        return self.path / "memory.json"

    @property
    def timeline_json(self) -> Path:
        """Memory over time."""
        return self.path / "timeline.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per optimizer step and per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def memory_png(self) -> Path:
        """The memory figures of the report as one image."""
        return self.path / "memory.png"

    @contextmanager
    def locked(self, *, new: bool) -> Iterator[None]:
        """Hold the lock of the run inside the block, so that no other process trains it.

        What a killed process left unfinished is removed.

        new: create the folder, and remove it at the end if no run.json has been written. Raises
        UsageError if another process holds the lock, if a new run's folder contains files, or if
        there is no run to resume.
        """
        if new:
            self.create()
        else:
            self.require_run_json()
        lock = self.path / _LOCK
        with ExitStack() as stack:
            with report_write_errors("the lock of the run", lock):
                is_free = stack.enter_context(locked_file(lock, wait=False))
            if not is_free:
                raise UsageError(
                    f"{self.path} is in use: another process trains this run now",
                    where="output",
                    hint="wait until it ends, or stop it",
                )
            for file in (self.run_json, self.metrics, self.memory_json, self.timeline_json):
                remove_partial_files(file)
            try:
                yield
            finally:
                if new and not self.run_json.is_file():
                    self.discard()

    def check_unused(self) -> None:
        """Raise UsageError if the folder contains files or cannot exist."""
        if not user_path(self.path).exists():
            return
        if not self.path.is_dir() or any(map(self._is_foreign, self.path.iterdir())):
            raise UsageError(
                f"{self.path} is in use",
                where="output",
                hint="name another folder with output=..., continue the run with --resume, or "
                "remove the folder",
            )

    def _is_foreign(self, path: Path) -> bool:
        """Return whether a path is not one that a process left which was killed at its start."""
        left_over = (self.path / _LOCK, self.importance, *partial_files(self.run_json))
        return path not in left_over

    def create(self) -> None:
        """Create the folder for a new run. Raises UsageError if it contains files."""
        self.check_unused()
        with report_write_errors(
            "the run's folder", self.path, hint="name another folder with output=..."
        ):
            self.path.mkdir(parents=True, exist_ok=True)

    def discard(self) -> None:
        """Remove the files of a run that has not completed a step; remove the folder if empty."""
        own = (self.run_json, self.metrics, self.constants, self.importance, self.path / _LOCK)
        for file in own:
            file.unlink(missing_ok=True)
        remove_partial_files(self.run_json)
        with suppress(OSError):  # The folder stays if it contains files of the user.
            self.path.rmdir()

    def require_run_json(self) -> None:
        """Raise UsageError if the folder has no run.json."""
        if not user_path(self.run_json).is_file():
            raise UsageError(
                f"{self.path} is not a run's folder",
                hint="a run's folder contains run.json; `qlora train` creates one",
            )

    def read(self) -> dict[str, Any]:
        """Return the content of `run.json`. Raises UsageError if it is missing or damaged."""
        self.require_run_json()
        return read_json(self.run_json, _checked)

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace `run.json` atomically. Raises QloraError if it cannot be written."""
        with report_write_errors("run.json", self.run_json):
            write_json(self.run_json, content)

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def remove_checkpoint(self, step: int) -> None:
        """Remove a checkpoint. A process that is killed meanwhile leaves no incomplete one."""
        folder = self.checkpoint(step)
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it is not used any more, and return its new path."""
        folder = self.checkpoint(step)
        aside = next(
            path
            for number in count(1)
            if not (path := folder.with_name(f"{folder.name}.damaged-{number}")).exists()
        )
        return folder.rename(aside)

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in ascending order."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in matches if match)


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of run.json. Raises ValueError if a value has a wrong type."""
    RunRecord.model_validate(content)
    return content
