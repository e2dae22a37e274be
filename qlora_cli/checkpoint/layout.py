"""The run's folder: every file name once, and what `run.json` holds.

- run.json          resolved recipe, automatic choices with reasons, versions, device, status
- adapter/          adapter_config.json + adapter_model.safetensors, in PEFT's format
- weights/          the trained model of full fine-tuning, instead of adapter/
- checkpoints/      step-000200/ ... whole or absent, never half
- memory.json       the ledger
- timeline.json     memory over time, of the phases that were tracked
- metrics.jsonl     one line an optimizer step
- report.html       self-contained
- memory.png        its memory figures as one picture
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from qlora_cli.errors import InputError, QloraError, UsageError

_T = TypeVar("_T")
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, AssertionError)
"""What readers raise on a file that is no longer as it was written."""
_STEP = re.compile(r"step-(\d{6,})")


class RunFolder:
    """Paths of a run, and the few operations that must not leave half a thing behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_json(self) -> Path:
        """What the run is."""
        return self.path / "run.json"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def weights(self) -> Path:
        """The trained model of full fine-tuning."""
        return self.path / "weights"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def memory_json(self) -> Path:
        """The ledger."""
        return self.path / "memory.json"

    @property
    def timeline_json(self) -> Path:
        """Memory over time."""
        return self.path / "timeline.json"

    @property
    def metrics(self) -> Path:
        """One JSON line an optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The report, self-contained."""
        return self.path / "report.html"

    @property
    def memory_png(self) -> Path:
        """The report's memory figures as one picture."""
        return self.path / "memory.png"

    def create(self) -> None:
        """Makes the folder for a new run. Raises UsageError where a run already lives in it."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UsageError(
                f"{self.path} is in use",
                where="output",
                hint="name another folder with output=..., continue the run with --resume, or "
                "remove the folder",
            )
        with writing("the run's folder", self.path, hint="name another folder with output=..."):
            self.path.mkdir(parents=True, exist_ok=True)

    def discard(self) -> None:
        """Takes a run back of which no step was done, so that its folder is free again."""
        self.run_json.unlink(missing_ok=True)
        self.metrics.unlink(missing_ok=True)
        with suppress(OSError):  # Whatever else lies in it is not ours to remove.
            self.path.rmdir()

    def read(self) -> dict[str, Any]:
        """run.json's content. Raises UsageError where this is no run's folder."""
        if not self.run_json.is_file():
            raise UsageError(
                f"{self.path} is no run's folder",
                hint="a run's folder holds run.json; `qlora train` makes one",
            )
        try:
            content = json.loads(self.run_json.read_text())
        except ValueError as fault:
            raise UsageError(f"damaged: {fault}", where=str(self.run_json)) from fault
        if not isinstance(content, dict):
            raise UsageError("damaged: it is no JSON object", where=str(self.run_json))
        return content

    def told(self, key: str) -> Any:
        """What run.json tells of it. Raises UsageError where it does not."""
        content = self.read()
        if key not in content:
            raise UsageError(f"damaged: it has no {key}", where=str(self.run_json))
        return content[key]

    def write(self, content: Mapping[str, Any]) -> None:
        """run.json, whole or as it was. Raises QloraError where the disk refuses."""
        with writing("run.json", self.run_json):
            write_json(self.run_json, content)

    def checkpoint(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.checkpoints / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, in order."""
        if not self.checkpoints.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)


@contextmanager
def writing(what: str, where: Path, hint: str = "free disk space and try again") -> Iterator[None]:
    """Turns a disk's refusal into a QloraError that says what could not be written."""
    try:
        yield
    except OSError as fault:
        raise QloraError(
            f"{what} could not be written: {fault.strerror or fault}", where=str(where), hint=hint
        ) from fault


@contextmanager
def appear_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name when all of it is on the disk.

    An older folder of the name is replaced in the last instant. On an error nothing is left.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        settle(beside, folder)
    except BaseException:  # Ctrl-C too must leave nothing half written
        shutil.rmtree(beside, ignore_errors=True)
        raise


def settle(beside: Path, folder: Path) -> None:
    """Gives a finished folder its name, in place of an older one, once its files are on disk."""
    for path in beside.rglob("*"):
        if path.is_file():
            _to_disk(path)
    old = folder.with_name(f".{folder.name}.old")
    # Left by a process that was killed between the two renames below, or while removing it.
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    beside.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_json(file: Path, make: Callable[[Any], _T], kind: type[InputError] = UsageError) -> _T:
    """What `make` makes of a file's content. Raises `kind` where it is no longer as written."""
    try:
        return make(json.loads(file.read_text()))
    except DAMAGE as fault:
        raise kind(f"{file.name} is damaged: {fault!r}", where=str(file)) from fault


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or as it was before."""
    beside = file.with_suffix(file.suffix + ".partial")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n")
        _to_disk(beside)
        beside.replace(file)
    except BaseException:  # Ctrl-C too must leave nothing half written
        beside.unlink(missing_ok=True)
        raise


def _to_disk(file: Path) -> None:
    """A rename must never survive a power cut that the content did not."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
