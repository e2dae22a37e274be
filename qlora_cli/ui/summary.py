"""A run in a few lines, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_cli.jobs.results import ReportResult
from qlora_cli.ui import memory
from qlora_cli.units import format_count


def summary(result: ReportResult) -> dict[str, str]:
    """What was run, on what, how far it came and how fast."""
    told = settings(result.run)
    facts = {
        "run": told["output"],
        "status": str(result.run["status"]),
        "device": memory.device_line(result.ledger),
        "base": f"{told['model.name']}, {told['base.bits']} bit",
    }
    if planned := memory.planned_against_measured(result.ledger):
        facts["peak"] = planned
    facts |= memory.proof(result.ledger)
    return facts | (_progress(result.metrics) if result.metrics else {})


def settings(run: Mapping[str, Any]) -> dict[str, str]:
    """The resolved recipe in run.json as dotted keys with their values."""
    return dict(_flat(run["recipe"], ""))


def _progress(metrics: tuple[dict[str, Any], ...]) -> dict[str, str]:
    first, last = metrics[0], metrics[-1]
    speeds = [line["tokens_per_second"] for line in metrics]
    joules = [line["joules"] for line in metrics if line.get("joules") is not None]
    facts = {
        "steps": format_count(last["step"]),
        "loss": f"{first['loss']:.3f} at first, {last['loss']:.3f} at last",
        "tokens": format_count(sum(line["tokens"] for line in metrics)),
        "speed": f"{sum(speeds) / len(speeds):,.0f} tokens/s",
    }
    return facts | ({"energy": f"{sum(joules) / 3600:.1f} Wh"} if joules else {})


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + key, text
