"""`qlora report`: a run's record, ledger and metrics, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qlora_cli.errors import UsageError
from qlora_cli.files.atomic import PARSE_ERRORS, read_json
from qlora_cli.jobs.results import ReportResult
from qlora_cli.memory.ledger import Ledger
from qlora_cli.memory.timeline import PhaseTrace, read_traces
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run

_T = TypeVar("_T")
_METRICS = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_bytes"}
_REMOVE = "take the line out; the rest of the report does not need it"


def run(run: Path, *, html: Path | None = None, png: Path | None = None) -> ReportResult:
    """What a run left behind. html, png: where the caller writes the page and the picture.

    Raises UsageError where the run has no ledger yet or one of its files is damaged.
    """
    source = Run(run)
    source.require("recipe")  # Which the page shows.
    ledger = ledger_of(source)
    return ReportResult(
        run=source.record,
        ledger=ledger,
        metrics=_metrics(source.folder.metrics),
        timeline=read_timeline(source.folder),
        html=html,
        png=png,
    )


def ledger_of(run: Run) -> Ledger:
    """Return the run's ledger. Raises UsageError if there is none yet or it is damaged."""
    ledger = read_ledger(run.folder)
    if ledger is None:
        raise UsageError(
            f"{run.path} has no memory.json yet; its status is {run.record.get('status')}",
            hint="a run writes it with each checkpoint; go on with `qlora train --resume`",
        )
    return ledger


def read_ledger(run: RunFolder) -> Ledger | None:
    """memory.json; None where the run has none yet. Raises UsageError on a damaged one."""
    return _read(run.memory_json, Ledger.from_dict)


def read_timeline(run: RunFolder) -> tuple[PhaseTrace, ...]:
    """timeline.json; empty where the run has none. Raises UsageError on a damaged one."""
    return _read(run.timeline_json, read_traces) or ()


def _read(file: Path, make: Callable[[dict[str, Any]], _T]) -> _T | None:
    return read_json(file, make) if file.is_file() else None


def _metrics(file: Path) -> tuple[dict[str, Any], ...]:
    if not file.is_file():
        return ()
    # What stands behind the last line's end was being written when the process died.
    *lines, _ = file.read_text().split("\n")
    return tuple(_metric(line, f"{file}:{number}") for number, line in enumerate(lines, 1))


def _metric(line: str, where: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(line)
        missing = sorted(_METRICS - content.keys())
    except PARSE_ERRORS as fault:
        raise UsageError(f"damaged: {fault}", where=where, hint=_REMOVE) from fault
    if missing:
        raise UsageError(f"damaged: no {', '.join(missing)}", where=where, hint=_REMOVE)
    return content
