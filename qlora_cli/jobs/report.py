"""`qlora report`: a run's record, ledger and metrics, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.errors import UsageError
from qlora_cli.jobs.results import ReportResult
from qlora_cli.memory.ledger import Ledger


def run(run: Path, *, html: Path | None) -> ReportResult:
    """What a run left behind. html: where the caller writes the page.

    Raises UsageError where the run has no ledger yet or one of its files is damaged.
    """
    folder = RunFolder(run)
    about = folder.read()
    if not folder.memory_json.is_file():
        raise UsageError(
            f"{run} has no memory.json yet; its status is {about.get('status')}",
            hint="a run writes it at its end; go on with `qlora train --resume`",
        )
    try:
        ledger = Ledger.from_dict(json.loads(folder.memory_json.read_text()))
    except (ValueError, KeyError, TypeError, AssertionError) as fault:
        raise UsageError(f"damaged: {fault!r}", where=str(folder.memory_json)) from fault
    return ReportResult(run=about, ledger=ledger, metrics=_metrics(folder.metrics), html=html)


def _metrics(file: Path) -> tuple[dict[str, Any], ...]:
    if not file.is_file():
        return ()
    lines = file.read_text().splitlines()
    try:
        return tuple(json.loads(line) for line in lines)
    except ValueError as fault:
        raise UsageError(f"damaged: {fault}", where=str(file)) from fault
