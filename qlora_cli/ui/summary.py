"""A summary of a run in a few lines, for the terminal and for the HTML report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_cli.jobs.results import ReportResult
from qlora_cli.recipe.classification import CLASS_METRICS, REGRESSION_METRICS
from qlora_cli.ui import memory_facts
from qlora_cli.units import format_count, format_figure


def summary(result: ReportResult) -> dict[str, str]:
    """Return label -> text: the run, its device and base, peak memory, progress and speed."""
    recipe, base = settings(result.run), result.run["recipe"].get("base", {})
    facts = {
        "run": recipe.get("output", "-"),
        "status": str(result.run["status"]),
        "device": memory_facts.device_text(result.ledger),
        "base": f"{recipe.get('model.name', '-')}, {_bits_text(base)} bit",
    }
    if peak := memory_facts.planned_and_measured(result.ledger):
        facts["peak memory"] = peak
    facts |= memory_facts.reliability(result.ledger)
    if result.metrics:
        facts |= _progress(result.metrics) | _energy(result)
    facts |= held_out_loss(result.evaluations)
    return facts | _held_out_metrics(result) if recipe.get("task") == "classification" else facts


def _bits_text(base: Mapping[str, Any]) -> str:
    """Return `4`, or `4 and 8` for a mixed base. base: the section of the recipe in run.json."""
    bits = {base.get("bits", "-"), *base.get("overrides", {}).values()}
    return " and ".join(map(str, sorted(bits)))


def held_out_loss(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the label and the text of the held-out loss; empty if it was never computed.

    evaluations: each with `step`, which is 0 before training, and `eval_loss`.
    """
    if not evaluations:
        return {}
    losses = {line["step"]: line["eval_loss"] for line in evaluations}
    last = max(losses)
    parts = [f"{losses[0]:.3f} before training"] if 0 in losses else []
    trained = {step: loss for step, loss in losses.items() if step > 0}
    if trained:
        parts.append(f"{trained[last]:.3f} after step {last:,}")
        best = min(trained, key=lambda step: trained[step])
        if best != last:
            parts.append(f"lowest {trained[best]:.3f} after step {best:,}")
    return {"held-out loss": ", ".join(parts)}


def _held_out_metrics(result: ReportResult) -> dict[str, str]:
    """Return the metrics of classification in the last evaluation."""
    if not result.evaluations:
        return {}
    last = result.evaluations[-1]
    names = [name for name in (*CLASS_METRICS, *REGRESSION_METRICS) if name in last]
    text = ", ".join(f"{name} {last[name]:.3f}" for name in names)
    return {"held-out metrics": f"{text} after step {last['step']:,}"}


def settings(run: Mapping[str, Any]) -> dict[str, str]:
    """Return the resolved recipe of run.json as dotted key -> value as text.

    run: the content of run.json.
    """
    return dict(_flatten(run["recipe"], ""))


def _progress(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    first, last = metrics[0], metrics[-1]
    speeds = [line["tokens_per_second"] for line in metrics]
    return {
        "steps": format_count(last["step"]),
        "loss": f"{first['loss']:.3f} in the first step, {last['loss']:.3f} in the last",
        "tokens": format_count(sum(line["tokens"] for line in metrics)),
        "speed": f"{sum(speeds) / len(speeds):,.0f} tokens/s",
    }


def _energy(result: ReportResult) -> dict[str, str]:
    """Return the energy of the steps and the tokens per joule, or why it was not measured."""
    lines = [line for line in result.metrics if line.get("joules") is not None]
    source = result.run.get("energy")
    if joules := sum(line["joules"] for line in lines):
        tokens = sum(line["tokens"] for line in lines)
        text = f"{format_figure(joules / 3600)} Wh, {format_figure(tokens / joules)} tokens/J"
        text += f" ({source})"
        if len(lines) < len(result.metrics):
            text += f"; of {format_count(len(lines))} steps"
        return {"energy": text}
    return {"energy": source} if source else {}


def _flatten(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + key, text
