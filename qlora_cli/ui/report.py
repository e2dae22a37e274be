"""`report.html`: a run on one page that needs nothing beside it, neither network nor scripts."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

from qlora_cli.errors import QloraError
from qlora_cli.jobs.results import ReportResult
from qlora_cli.ui import memory
from qlora_cli.ui.summary import settings, summary

_TEMPLATE = Path(__file__).with_name("report.html")
_CURVES = (("loss", "Loss", "nats a token"), ("tokens_per_second", "Speed", "tokens/s"))
"""Key in metrics.jsonl, title, label of the axis."""


def write(result: ReportResult, path: Path) -> None:
    """Writes the page, whole or not at all. Raises QloraError where it cannot be written."""
    page = render(result)
    beside = path.with_suffix(".tmp")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        what = f"the page cannot be written: {error.strerror}"
        raise QloraError(what, where=str(path)) from error


def render(result: ReportResult) -> str:
    """The page as text."""
    # Both are imported here because a command without a page shall not wait for them.
    import jinja2

    from qlora_cli.ui import figures

    sides, phases = memory.by_side(result.ledger), memory.by_phase(result.ledger)
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        saving=memory.saving(result.ledger),
        summary=summary(result),
        sides=memory.grid(sides),
        sides_figure=_embedded(figures.stacked_bars(sides)),
        phases=memory.grid(phases),
        phases_figure=_embedded(figures.stacked_bars(phases)),
        instrument=result.ledger.instrument,
        counters=memory.counters(result.ledger),
        curves=list(_curves(result)),
        choices=result.run.get("choices", ()),
        tensors=result.run.get("tensors", ()),
        settings=settings(result.run),
        versions=result.run.get("versions", {}),
    )


def _curves(result: ReportResult) -> Iterator[dict[str, str]]:
    from qlora_cli.ui import figures

    if result.metrics:
        for key, title, label in _CURVES:
            yield {"title": title, "source": _embedded(figures.curve(result.metrics, key, label))}


def _embedded(svg: str) -> str:
    """As an image of its own: identifiers inside one figure cannot meet those of another."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
