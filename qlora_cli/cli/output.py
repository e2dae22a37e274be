"""Shared by all commands: common options, progress on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qlora_cli.memory.gc_pause import gc_paused

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from qlora_cli.events import Observer, SweepObserver
    from qlora_cli.jobs.results import Result
    from qlora_cli.recipe.schema import Recipe

_R = TypeVar("_R", bound="Result")

_CONTROLS = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that `json.dumps` does not escape: controls of a terminal, and half characters."""
_NEEDS_JSON = "qlora_cli.needs_json"
"""Key in click's `Context.meta`: whether the one JSON object of `--json` is still to be printed."""


def _begin_json(ctx: click.Context, _: click.Parameter, as_json: bool) -> bool:
    ctx.meta[_NEEDS_JSON] = as_json
    return as_json


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,  # Before the other options, so that their errors are printed as JSON too.
    callback=_begin_json,
    help="Print the result as one JSON object on stdout.",
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[key=value ...]")


def recipe_of(recipe: str | Path, overrides: Sequence[str]) -> Recipe:
    """Load a recipe with overrides. Print on stderr which settings of the file these leave useless.

    Raises the errors of `load_recipe`.
    """
    from qlora_cli.recipe.load import load_with_dropped

    loaded = load_with_dropped(recipe, overrides)
    for line in loaded.dropped.values():
        from qlora_cli.ui.console import printable

        click.echo(printable(f"note: {line}"), err=True)
    return loaded.recipe


@contextmanager
def fast_import() -> Iterator[None]:
    """Disable garbage collection while a job's modules are imported.

    These imports create about a million objects that are never freed. Without this, the collector
    traverses them many times, which is 0.4 s of `import bitsandbytes`.
    """
    with gc_paused():
        yield


@contextmanager
def job_observer() -> Iterator[SweepObserver]:
    """Yield an observer that shows a job's progress on stderr.

    Inside the block, everything that libraries print on stdout goes to stderr too, and SIGTERM and
    SIGHUP end the job as Ctrl-C does, so that no unfinished file is left.
    """
    from qlora_cli.train.stop_signals import endings_as_interrupt
    from qlora_cli.ui import console, progress

    watching = progress.watching(console.messages())
    with endings_as_interrupt(), redirect_stdout(sys.stderr), watching as observer:
        yield observer


def write_page(run: Path, observer: Observer) -> None:
    """Write `report.html` and `memory.png` into a run's folder and report where they are."""
    from qlora_cli.jobs import report as job
    from qlora_cli.runs.layout import RunFolder
    from qlora_cli.ui import report

    folder = RunFolder(run)
    report.write(job.run(run, html=folder.report, png=folder.memory_png))
    observer.note(f"report: {folder.report}")


def emit(result: _R, as_json: bool, render: Callable[[_R], RenderableType]) -> None:
    """Print a job's result on stdout.

    as_json: print `result.to_dict()` as one JSON object; otherwise print what `render` returns.
    """
    if as_json:
        emit_json(result.to_dict())
        return
    from qlora_cli.ui import console

    # soft_wrap: lines of text are not broken. Tables are fitted to the console's width anyway.
    console.results().print(render(result), soft_wrap=True)


def suggest(*words: str | Path) -> None:
    """Print on stderr the command that usually follows. words: those after `qlora`."""
    from rich.text import Text

    from qlora_cli.ui import console

    command = shlex.join(["qlora", *map(str, words)])
    console.messages().print(Text(f"next: {command}", style="dim"), soft_wrap=True)


def emit_error(ctx: click.Context, error: Exception, exit_code: int) -> None:
    """Print an error as one JSON object on stdout if `--json` was given and nothing is printed yet.

    The object has the key `error` with `kind`, `what`, `where`, `hint` and `problems`, and the key
    `exit_code`.
    """
    if not ctx.meta.get(_NEEDS_JSON):
        return
    problems = [vars(problem) for problem in getattr(error, "problems", ())]
    what = error.format_message() if isinstance(error, click.ClickException) else str(error)
    content = {
        "kind": type(error).__name__,
        "what": getattr(error, "what", what),
        "where": getattr(error, "where", None),
        "hint": getattr(error, "hint", None),
        "problems": problems,
    }
    emit_json({"error": content, "exit_code": exit_code})


def expect_no_json() -> None:
    """Print no JSON object in this process, because another one of the same job does."""
    click.get_current_context().meta[_NEEDS_JSON] = False


def emit_json(content: dict[str, Any]) -> None:
    """Print one JSON object on stdout. NaN and infinity, which JSON does not have, become null."""
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta[_NEEDS_JSON] = False
    text = json.dumps(_without_nonfinite(content), indent=1, ensure_ascii=False, allow_nan=False)
    click.echo(escape_controls(text))


def escape_controls(text: str) -> str:
    """Return JSON with the same value, in which a terminal finds no control characters."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def echo(text: str, *, end: str = "\n", err: bool = False) -> None:
    """Print text from a model or a file, with visible characters in place of control characters."""
    from qlora_cli.ui.console import printable

    click.echo(printable(text) + end, nl=False, err=err)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
