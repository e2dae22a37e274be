"""`qlora report`: read a run's record, memory ledger, timeline and metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qlora_cli.errors import UsageError
from qlora_cli.files.atomic import PARSE_ERRORS, read_json
from qlora_cli.jobs.results import ReportResult
from qlora_cli.memory.ledger import Ledger
from qlora_cli.memory.timeline import PhaseTrace, read_traces
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import is_evaluation, wrong_value
from qlora_cli.runs.run import Run

_T = TypeVar("_T")
_METRICS = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_bytes"}
"""Keys that the line of a step in metrics.jsonl must have."""
_REMOVE_LINE = "delete this line; the report can be made without it"


def run(run: Path, *, html: Path | None = None, png: Path | None = None) -> ReportResult:
    """Return everything that a report shows of a run.

    run: the run's folder. html, png: where the caller will write the page and the image; they are
    only passed on to the result. Raises UsageError if the run has no ledger yet or one of its files
    is damaged.
    """
    source = Run(run)
    for key in ("status", "recipe"):  # The page shows them.
        source.require(key)
    _ = source.recipe
    ledger = ledger_of(source)
    lines = _metrics(source.folder.metrics)
    return ReportResult(
        run=source.record,
        ledger=ledger,
        metrics=tuple(line for line in lines if not is_evaluation(line)),
        evaluations=tuple(filter(is_evaluation, lines)) or _final_evaluation(source.record),
        timeline=read_timeline(source.folder),
        html=html,
        png=png,
    )


def _final_evaluation(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the evaluation after the last step that run.json has; empty if it has none.

    Older versions did not write evaluations into metrics.jsonl.
    """
    result = record.get("result") or {}
    if result.get("eval_loss") is None:
        return ()
    return ({"step": result["steps"], "eval_loss": result["eval_loss"]},)


def ledger_of(run: Run) -> Ledger:
    """Return the run's ledger. Raises UsageError if there is none yet or it is damaged."""
    ledger = read_ledger(run.folder)
    if ledger is None:
        raise UsageError(
            f"{run.path} has no memory.json yet; its status is {run.record.get('status')}",
            hint="a run writes it with each checkpoint; resume it with `qlora train --resume`",
        )
    return ledger


def read_ledger(run: RunFolder) -> Ledger | None:
    """Return the content of memory.json, or None if there is none. Raises UsageError if damaged."""
    return _read(run.memory_json, Ledger.from_dict)


def read_timeline(run: RunFolder) -> tuple[PhaseTrace, ...]:
    """Return the traces of timeline.json, empty if there is none. Raises UsageError if damaged."""
    return _read(run.timeline_json, read_traces) or ()


def _read(file: Path, parse: Callable[[dict[str, Any]], _T]) -> _T | None:
    return read_json(file, parse) if file.is_file() else None


def _metrics(file: Path) -> tuple[dict[str, Any], ...]:
    if not file.is_file():
        return ()
    # Text after the last newline is an incomplete line: the process stopped while it wrote it.
    *lines, _ = file.read_text(errors="replace").split("\n")
    return tuple(_metric(line, f"{file}:{number}") for number, line in enumerate(lines, 1))


def _metric(line: str, where: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(line)
        required = {"step"} if is_evaluation(content) else _METRICS
        missing = sorted(required - content.keys())
        wrong = wrong_value(content) if not missing else None
    except PARSE_ERRORS as error:
        raise UsageError(f"damaged: {error}", where=where, hint=_REMOVE_LINE) from error
    if wrong is not None:
        what = f"damaged: {wrong[:60]} is {str(content.get(wrong))[:60]!r}"
        raise UsageError(what, where=where, hint=_REMOVE_LINE)
    if missing:
        raise UsageError(f"damaged: {', '.join(missing)} missing", where=where, hint=_REMOVE_LINE)
    return content
