"""Renders the result of `qlora quantize`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.quantize_results import MixStep, QuantizeResult
from qlora_cli.ui.tables import fact_lines
from qlora_cli.units import format_bytes

_SHOWN = 12
"""Linears in the table."""


def quantize(result: QuantizeResult) -> RenderableType:
    """Render the measured bases, the linears that cost the most, and the mix."""
    chosen = result.chosen
    total = sum(cost.kl[4] for cost in result.linears)
    shown = sum(cost.kl[4] for cost in result.linears[:_SHOWN])
    parts: list[RenderableType] = [
        Text(f"KL(16 bit || quantized) in nats per token, on {result.rows}"),
        _bases(result),
        Text(
            f"The {min(_SHOWN, len(result.linears))} linears that cost the most in 4 bit: "
            f"{shown / total if total else 0:.0%} of the sum over {len(result.linears)}"
        ),
        _linears(result),
    ]
    facts = {
        "base": f"{format_bytes(chosen.bytes)}, {_growth(chosen, result)} compared with 4 bit",
        "KL": f"{chosen.kl:.4f} measured, {_predicted(chosen)} predicted; "
        f"{chosen.recovered:.0%} of the KL of 4 bit is recovered",
        "base.overrides": ", ".join(f"{k}: {v}" for k, v in chosen.overrides.items()) or "none",
    }
    if not result.reached:
        facts["target"] = f"{result.target_kl:g} was not reached"
    if result.out is not None:
        facts["recipe"] = str(result.out)
    return Group(*parts, fact_lines(facts))


def _growth(step: MixStep, result: QuantizeResult) -> str:
    return f"{step.bytes / result.plain.bytes - 1:+.1%}"


def _predicted(step: MixStep) -> str:
    # The estimate is of first order and can be a little below 0; adding 0 removes the sign of -0.
    return "-" if step.predicted_kl is None else f"{round(step.predicted_kl, 4) + 0.0:.4f}"


def _bases(result: QuantizeResult) -> Table:
    table = Table("base", "size", "", "linears", "predicted", "measured", "recovered", box=None)
    for step in (*result.steps, result.bits_8):
        counts = ", ".join(f"{number} in {bits} bit" for bits, number in step.counts.items())
        is_chosen = step is result.chosen and step is not result.plain
        table.add_row(
            step.name,
            format_bytes(step.bytes),
            _growth(step, result),
            counts,
            _predicted(step),
            f"{step.kl:.4f}",
            f"{step.recovered:.0%}",
            style="bold" if is_chosen else "",
        )
    return table


def _linears(result: QuantizeResult) -> Table:
    table = Table(box=None)
    table.add_column("linear", no_wrap=True, overflow="fold")  # It is copied into base.overrides.
    for name in ("weights", "alone in 4 bit", "alone in 8 bit"):
        table.add_column(name, justify="right")
    table.add_column("chosen")
    for cost in result.linears[:_SHOWN]:
        table.add_row(
            cost.path,
            f"{cost.parameters:,}",
            f"{cost.kl[4]:.5f}",
            f"{cost.kl[8]:.5f}",
            f"{cost.bits} bit",
        )
    return table
