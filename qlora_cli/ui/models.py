"""Renders the result of `qlora models`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.model_results import MeasuredLaw, ModelsResult

_STYLES = {"tested": "green", "proved": "green", "refused": "yellow"}


def models(result: ModelsResult) -> RenderableType:
    """Render one line per model type, and the laws and roles of one that was proved."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for item in result.types:
        table.add_row(item.model_type, Text(item.state, style=_STYLES[item.state]), item.detail)
    parts: list[RenderableType] = [table]
    if result.laws:
        parts.append(_laws(result.laws))
    parts += [Text(f"note: {note}") for note in result.notes]
    if any(not law.holds for law in result.laws):
        parts.append(Text("It cannot be trained with this version: the last law does not hold."))
    elif result.roles:
        parts.append(
            Text(f"It can be trained. Roles for adapter.targets: {', '.join(result.roles)}")
        )
    else:
        parts.append(
            Text(
                "Any other model type is proved on a small model at its first use: "
                "`qlora models NAME_OR_FOLDER`"
            )
        )
    return Group(*parts)


def _laws(laws: tuple[MeasuredLaw, ...]) -> Table:
    table = Table("law", "measured", "limit", box=None, pad_edge=False)
    for law in laws:
        style = "" if law.holds else "yellow"
        value = law.error if law.value is None else f"{law.value:.1e}"
        bound = "at least" if law.is_lower_bound else "at most"
        table.add_row(law.text, Text(value or "", style=style), f"{bound} {law.limit:.0e}")
    return table
