"""Render the result of `qlora init`: the settings that were chosen, each with its reason."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.init_result import InitResult
from qlora_cli.recipe.write import yaml_value
from qlora_cli.units import format_bytes, format_count


def init(result: InitResult) -> RenderableType:
    """Render the settings with their reasons, the planned memory and the written file."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("setting", "value", "reason"):
        table.add_column(column, overflow="fold")
    for choice in result.choices:
        table.add_row(choice.key, yaml_value(choice.value), choice.reason)
    about = "about " if result.is_estimate else ""
    sentence = (
        f"Planned on {result.device}: {format_bytes(result.needed_bytes)} of "
        f"{format_bytes(result.usable_bytes)}; {format_count(result.rows)} training rows, "
        f"{about}{format_count(result.updates)} updates."
    )
    return Group(table, Text(sentence), Text(f"Written: {result.file}", style="bold"))
