"""`report.html`: a run on one page that needs nothing beside it, neither network nor scripts."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.errors import UsageError
from qlora_cli.files.atomic import atomic_file, report_write_errors
from qlora_cli.jobs.results import ReportResult
from qlora_cli.runs.layout import RunFolder
from qlora_cli.ui import memory
from qlora_cli.ui.summary import settings, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("report.html")
_CURVES = (("loss", "Loss", "nats a token"), ("tokens_per_second", "Speed", "tokens/s"))
"""Key in metrics.jsonl, title, label of the axis."""
_PAGE_MARK = b'<meta name="generator" content="qlora">'
"""As the template writes it."""
_PICTURE_MARK = b"Software\0qlora"
"""As `figures.as_png` writes it."""
_MARK_WITHIN = 4096
"""Bytes from a file's beginning."""


def check_free(run: Path, html: Path | None, png: Path | None) -> None:
    """Raises UsageError where the page or the picture would overwrite a foreign file.

    A report that qlora wrote before may be overwritten, and the report in the folder `run`.
    """
    folder = RunFolder(run)
    for option, path, own, mark in (
        ("--html", html, folder.report, _PAGE_MARK),
        ("--png", png, folder.memory_png, _PICTURE_MARK),
    ):
        if path is None or path.resolve() == own.resolve() or not os.path.lexists(path):
            continue
        if not _is_marked(path, mark):
            raise UsageError(
                f"{path} exists and is no report that qlora wrote",
                where=option,
                hint="name another file, or overwrite this one with --force",
            )


def _is_marked(path: Path, mark: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return path.is_file() and mark in stream.read(_MARK_WITHIN)
    except OSError:
        return False


def write(result: ReportResult) -> None:
    """The page and the picture where the result names a file for them, each whole or not at all.

    Raises QloraError where one cannot be written.
    """
    if result.html is not None:
        _write(result.html, render(result).encode())
    if result.png is not None:
        from qlora_cli.ui import figures

        _write(result.png, figures.as_png(figures.poster(result)))


def _write(path: Path, content: bytes) -> None:
    hint = "free disk space, or name a file in another folder"
    with report_write_errors("the report", path, hint), atomic_file(path) as beside:
        beside.write_bytes(content)


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
        notes=result.ledger.notes,
        summary=summary(result),
        sides=memory.grid(sides),
        sides_figure=_embedded(figures.stacked_bars(sides)),
        over_time=list(_over_time(result)),
        phases=memory.grid(phases),
        phases_figure=_embedded(figures.stacked_bars(phases)),
        instrument=result.ledger.instrument,
        differences=memory.differences(result.ledger),
        curves=list(_curves(result)),
        choices=result.run.get("choices", ()),
        tensors=result.run.get("tensors", ()),
        settings=settings(result.run),
        versions=result.run.get("versions", {}),
    )


def _over_time(result: ReportResult) -> Iterator[dict[str, str]]:
    """One step and the run; an older run has no timeline."""
    from qlora_cli.ui import figures, timelines

    if step := timelines.worst_step(result.timeline):
        figure = figures.over_step(step, result.ledger.planned_peak_bytes)
        about = f"the step with the highest peak, {timelines.name(step)}"
        yield {"title": "Memory over one step", "about": about, "source": _embedded(figure)}
    if result.timeline:
        about = "what was tracked, each stretch as wide as the others; the gaps were not tracked"
        source = _embedded(figures.over_run(result))
        yield {"title": "Memory over the run", "about": about, "source": source}


def _curves(result: ReportResult) -> Iterator[dict[str, str]]:
    from qlora_cli.ui import figures

    if result.metrics:
        for key, title, label in _CURVES:
            yield {"title": title, "source": _embedded(figures.curve(result.metrics, key, label))}


def _embedded(figure: Figure) -> str:
    """As an image of its own: identifiers inside one figure cannot meet those of another."""
    from qlora_cli.ui import figures

    svg = figures.as_svg(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
