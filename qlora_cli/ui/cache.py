"""Render the entries of the cache."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.files.cache import KINDS
from qlora_cli.jobs.cache import CacheResult
from qlora_cli.units import format_bytes, format_count


def entries(result: CacheResult) -> RenderableType:
    """Render a table of the entries by kind, and their total size."""
    table = Table(box=box.SIMPLE)
    table.add_column("kind", no_wrap=True)
    table.add_column("made of", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for entry in result.entries:
        table.add_row(KINDS[entry.kind], Text(entry.description), format_bytes(entry.bytes))
    number = len(result.entries)
    summary = (
        f"{'removed ' if result.cleared else ''}{format_count(number)} "
        f"{'entry' if number == 1 else 'entries'}, {format_bytes(result.bytes)}, in {result.folder}"
    )
    return Group(*([table] if number else []), Text(summary))
