"""The tables of `qlora quantize`."""

from __future__ import annotations

from rich.console import Console

from qlora_cli.jobs.quantize_results import LinearCost, MixStep, QuantizeResult
from qlora_cli.ui.quantize import quantize


def test_the_names_of_linears_are_complete_at_80_columns() -> None:
    names = [f"model.layers.{block}.mlp.down_proj.original" for block in range(20)]
    linears = tuple(LinearCost(name, 8, 131_072, {4: 0.00151, 8: 0.00001}) for name in names)
    step = MixStep("4 bit", 100, {}, {4: 20}, -0.00001, 0.0288, 0.0)
    result = QuantizeResult("7 rows", 99, 2.0, None, None, True, step, (step,), linears, None, 1.0)
    console = Console(width=80, record=True)
    with console.capture() as capture:
        console.print(quantize(result))
    text = capture.get()
    assert all(name in text for name in names[:12])
    assert "…" not in text
    assert "-0.0000" not in text
