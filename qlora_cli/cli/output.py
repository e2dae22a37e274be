"""What commands share: loading a recipe, watching a job, printing its result."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qlora_cli.memory.gc_pause import gc_paused

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from qlora_cli.events import Observer
    from qlora_cli.jobs.results import Result

_R = TypeVar("_R", bound="Result")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout."
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[key=value ...]")


@contextmanager
def importing() -> Iterator[None]:
    """For a job's modules, which make a million objects that stay.

    Python's collector would look through them again and again: 0.4 s of `import bitsandbytes`.
    """
    with gc_paused():
        yield


@contextmanager
def working() -> Iterator[Observer]:
    """An observer for a job; whatever libraries print while it runs goes to stderr."""
    from qlora_cli.ui import console, progress

    with redirect_stdout(sys.stderr), progress.watching(console.messages()) as observer:
        yield observer


def write_page(run: Path, observer: Observer) -> None:
    """The report of a run, into its folder: the page and the picture."""
    from qlora_cli.jobs import report as job
    from qlora_cli.runs.layout import RunFolder
    from qlora_cli.ui import report

    folder = RunFolder(run)
    report.write(job.run(run, html=folder.report, png=folder.memory_png))
    observer.note(f"report: {folder.report}")


def emit(result: _R, as_json: bool, render: Callable[[_R], RenderableType]) -> None:
    """The result on stdout: as one JSON object, or rendered for people."""
    if as_json:
        emit_json(result.to_dict())
        return
    from qlora_cli.ui import console

    # soft_wrap: lines of text are as long as they are; tables fit the console all the same.
    console.results().print(render(result), soft_wrap=True)


def emit_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout. JSON has no word for NaN and infinity; they become null."""
    click.echo(json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
