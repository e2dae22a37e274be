"""Rows that compare plan and run: their order, their bounds, and their Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

OVER, UNDER, RESERVED = 0.03, -0.01, 0.05
"""Bounds of the relative error: above and below the measured bytes, and for reserved bytes."""

Row = Mapping[str, Any]


def largest_error_first(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by the largest absolute error of allocated or reserved bytes."""
    return sorted(rows, key=lambda row: (-_size(row), row["case"]))


def _size(row: Row) -> float:
    errors: list[float] = [row["error"], row["reserved"]["error"] or 0.0]
    return max(map(abs, errors))


def failures(rows: Sequence[Row]) -> list[str]:
    """Return one line for each case that is beyond the bounds."""
    cases = ((row["case"], ", ".join(_faults(row))) for row in rows)
    return [f"{case}: {faults}" for case, faults in cases if faults]


def _faults(row: Row) -> Iterator[str]:
    errors = {"peak": row["error"]}
    errors |= {name: phase["error"] for name, phase in row["phases"].items()}
    for name, error in errors.items():
        if not UNDER <= error <= OVER:
            yield f"{name} {error:+.2%}"
    reserved = row["reserved"]["error"]
    if reserved is not None and abs(reserved) > RESERVED:
        yield f"reserved {reserved:+.2%}"


def table(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown, in the order of its rows."""
    rows = report["rows"]
    on_gpu = any(row["reserved"]["measured_bytes"] for row in rows)
    head = ["error", "measured MB", "planned MB", "case", "step", "load"]
    head += ["accelerate MB", "litgpt MB"]
    if on_gpu:
        head[3:3] = ["reserved MB", "error"]
    lines = [*_heading(report), "", _line(head), _line("---" for _ in head)]
    lines += [_line(_cells(row, on_gpu)) for row in rows]
    return "\n".join(lines) + "\n"


def _heading(report: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rows = report["rows"]
    phases = [phase["error"] for row in rows for phase in row["phases"].values()]
    reserved = [row["reserved"]["error"] for row in rows if row["reserved"]["error"] is not None]
    ranges = {
        "peak of the job": [row["error"] for row in rows],
        "each phase": phases,
        "reserved bytes": reserved,
    }
    return [
        f"`{report['command']}`",
        "",
        f"On {report['device']}; {versions}. Measured with {report['measured_with']}. "
        f"{report['seconds']} s.",
        "",
        f"{len(rows)} configurations, the largest error first. Error is planned / measured - 1. "
        + "; ".join(f"{name}: {_range(errors)}" for name, errors in ranges.items() if errors)
        + ". MB are 10^6 bytes. accelerate (weights alone / training with Adam) and litgpt: "
        "their estimators, computed by `tools/validation/plan_estimates.py`.",
    ]


def _range(errors: Sequence[float]) -> str:
    return f"{min(errors):+.2%} to {max(errors):+.2%}"


def _cells(row: Row, on_gpu: bool) -> list[str]:
    others, reserved = row["others"], row["reserved"]
    phases = row["phases"]
    cells = [
        f"{row['error']:+.2%}",
        _mb(row["measured_bytes"]),
        _mb(row["planned_bytes"]),
        row["case"],
        f"{phases['step']['error']:+.2%}",
        f"{phases['load']['error']:+.2%}",
        f"{_mb(others['accelerate_load'])} / {_mb(others['accelerate_adam'])}",
        _mb(others["litgpt_training"]),
    ]
    if on_gpu:
        error = reserved["error"]
        cells[3:3] = [
            _mb(reserved["measured_bytes"]),
            "not planned" if error is None else f"{error:+.2%}",
        ]
    return cells


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
