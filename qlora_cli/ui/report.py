"""Write a run's report: one HTML page and one PNG image.

The page is a single file. It contains its figures and needs no network and no scripts.
"""

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
from qlora_cli.ui import memory, memory_facts
from qlora_cli.ui.summary import settings, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("report.html")
_METRICS = (("loss", "Loss", "nats per token"), ("tokens_per_second", "Speed", "tokens/s"))
"""(key in metrics.jsonl, title of the figure, label of its axis)."""
_PAIR_METRICS = (
    ("loss", "Loss", "per pair"),
    ("train_accuracy", "Accuracy", "share of pairs"),
    ("train_margin", "Reward margin", "mean over pairs"),
    _METRICS[1],
)
"""The same for preference training."""
_CLASS_METRICS = (("loss", "Loss", "per row"), ("train_accuracy", "Accuracy", "share of rows"))
"""The same for classification."""
_PAGE_MARK = b'<meta name="generator" content="qlora">'
"""Bytes that identify a page of qlora; the template contains them."""
_IMAGE_MARK = b"Software\0qlora"
"""Bytes that identify an image of qlora; `figures.as_png` writes them."""
_MARK_WITHIN = 4096
"""The marks are within this many bytes from the start of a file."""


def check_targets(run: Path, html: Path | None, png: Path | None, *, force: bool = False) -> None:
    """Raise UsageError if the page or the image would overwrite a file of the run or of the user.

    Allowed targets are the run's own `report.html` and `memory.png`, any new file outside the run's
    folder, and an existing file there that qlora wrote as a report.

    run: the run's folder.
    html, png: the files to write; None for no file.
    force: also allow existing files outside the run's folder that are not reports.
    """
    folder = RunFolder(run)
    for option, path, own, mark in (
        ("--html", html, folder.report, _PAGE_MARK),
        ("--png", png, folder.memory_png, _IMAGE_MARK),
    ):
        if path is None or path.resolve() == own.resolve():
            continue
        if _is_inside(path, run):
            raise UsageError(
                f"{path} is in the run's folder, and its files are not overwritten by a report",
                where=option,
                hint=f"name {own} or a file outside the folder",
            )
        if not force and os.path.lexists(path) and not _is_marked(path, mark):
            raise UsageError(
                f"{path} exists and is not a report written by qlora",
                where=option,
                hint="name another file, or overwrite this one with --force",
            )


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether `path`, or the file that it links to, is in `folder`."""
    entry = path.parent.resolve() / path.name
    return any(place.is_relative_to(folder.resolve()) for place in (entry, path.resolve()))


def _is_marked(path: Path, mark: bytes) -> bool:
    """Return whether the file begins with a mark of qlora's own reports."""
    try:
        with path.open("rb") as stream:
            return path.is_file() and mark in stream.read(_MARK_WITHIN)
    except OSError:
        return False


def write(result: ReportResult) -> None:
    """Write the page to `result.html` and the image to `result.png`, unless they are None.

    Each file is written completely or not at all. Raises QloraError if one cannot be written.
    """
    if result.html is not None:
        _write(result.html, render(result).encode())
    if result.png is not None:
        from qlora_cli.ui import figures

        _write(result.png, figures.as_png(figures.overview_figure(result)))


def _write(path: Path, content: bytes) -> None:
    hint = "free disk space, or name a file in another folder"
    with report_write_errors("the report", path, hint), atomic_file(path) as temporary:
        temporary.write_bytes(content)


def render(result: ReportResult) -> str:
    """Return the HTML page of a run."""
    # Imported here, so that commands that write no page do not wait for them.
    import jinja2

    from qlora_cli.ui import figures

    ledger = result.ledger
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        saving=memory_facts.saving(ledger),
        notes=ledger.notes,
        summary=summary(result),
        methods=memory.method_grid(ledger),
        methods_figure=_embed(figures.bar_figure(memory.peak_by_method(ledger))),
        over_time=list(_figures_over_time(result)),
        phases=memory.phase_grid(ledger),
        phases_figure=_embed(figures.bar_figure(memory.peak_by_phase(ledger))),
        instrument=ledger.instrument,
        counter_differences=memory_facts.counter_differences(ledger),
        metrics=list(_metric_figures(result)),
        choices=result.run.get("choices", ()),
        tensors=result.run.get("tensors", ()),
        settings=settings(result.run),
        versions=result.run.get("versions", {}),
    )


def _figures_over_time(result: ReportResult) -> Iterator[dict[str, str]]:
    """Yield the figures of one step and of the run; none for a run without timeline.json."""
    from qlora_cli.ui import figures, timelines

    if step := timelines.peak_step(result.timeline):
        figure = figures.step_figure(step, result.ledger.planned_peak_bytes)
        caption = f"The step with the highest peak, {timelines.trace_name(step)}."
        yield {"title": "Memory over one step", "caption": caption, "source": _embed(figure)}
    if result.timeline:
        caption = (
            "Each tracked phase has the same width, whatever its duration; "
            "hatched steps were not tracked."
        )
        source = _embed(figures.run_figure(result))
        yield {"title": "Memory over the run", "caption": caption, "source": source}


def _metric_figures(result: ReportResult) -> Iterator[dict[str, str]]:
    from qlora_cli.ui import figures

    held_out_keys = ("loss", "train_accuracy") if _is_classification(result) else ("loss",)
    if result.metrics:
        for key, title, label in _shown_metrics(result):
            if key not in result.metrics[0]:
                continue
            held_out = "eval_loss" if key == "loss" else key.removeprefix("train_")
            evaluations = result.evaluations if key in held_out_keys else ()
            figure = figures.metric_figure(result.metrics, key, label, evaluations, held_out)
            yield {"title": title, "source": _embed(figure)}


def _shown_metrics(result: ReportResult) -> tuple[tuple[str, str, str], ...]:
    if _is_classification(result):
        return (*_CLASS_METRICS, _METRICS[1])
    return _PAIR_METRICS if "train_margin" in result.metrics[0] else _METRICS


def _is_classification(result: ReportResult) -> bool:
    return bool(result.run["recipe"].get("task") == "classification")


def _embed(figure: Figure) -> str:
    """Return the figure as a data URL.

    As an image of its own, because identifiers of two inline SVGs could collide.
    """
    from qlora_cli.ui import figures

    svg = figures.as_svg(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
