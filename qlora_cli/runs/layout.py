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
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_cli.errors import UsageError
from qlora_cli.files.atomic import report_write_errors, write_json

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
        with report_write_errors(
            "the run's folder", self.path, hint="name another folder with output=..."
        ):
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

    def require(self, key: str) -> Any:
        """What run.json tells of it. Raises UsageError where it does not."""
        content = self.read()
        if key not in content:
            raise UsageError(f"damaged: it has no {key}", where=str(self.run_json))
        return content[key]

    def write(self, content: Mapping[str, Any]) -> None:
        """run.json, whole or as it was. Raises QloraError where the disk refuses."""
        with report_write_errors("run.json", self.run_json):
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
