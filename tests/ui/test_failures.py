"""Errors as they are printed on stderr."""

from __future__ import annotations

import io

from rich.console import Console

from qlora_cli.errors import Interrupted, Problem, QloraError, RecipeError
from qlora_cli.ui import failures


def shown(error: QloraError) -> str:
    stream = io.StringIO()
    failures.show(error, Console(file=stream, width=60, markup=False, highlight=False))
    return stream.getvalue()


def test_an_error_is_printed_with_its_place_and_hint() -> None:
    text = shown(QloraError("is damaged", where="model.safetensors", hint="download it again"))
    assert text == "error: model.safetensors: is damaged\n  download it again\n"


def test_every_problem_is_shown_with_its_place_and_hint() -> None:
    problems = [Problem("a.yaml:1: train.lrr", "unknown setting", "did you mean train.lr?")]
    problems.append(Problem("override x", "is not an override"))
    text = shown(RecipeError("a.yaml has 2 problems", problems, hint="see qlora recipe schema"))
    assert text.splitlines() == [
        "error: a.yaml has 2 problems",
        "  a.yaml:1: train.lrr: unknown setting",
        "    did you mean train.lr?",
        "  override x: is not an override",
        "  see qlora recipe schema",
    ]


def test_a_long_path_is_not_broken_over_lines() -> None:
    path = "/".join(["folder"] * 30)
    assert path in shown(QloraError("is missing", where=path))


def test_brackets_are_not_read_as_markup() -> None:
    assert "[bold]x[/bold]" in shown(QloraError("[bold]x[/bold]"))


def test_an_interrupted_job_is_not_printed_as_an_error() -> None:
    assert shown(Interrupted("a checkpoint was written")).startswith("interrupted: ")


def test_a_bug_of_the_program_is_printed_with_how_to_get_a_traceback() -> None:
    stream = io.StringIO()
    failures.show_unexpected(KeyError("x"), Console(file=stream, width=60))
    assert "KeyError: 'x'" in stream.getvalue()
    assert failures.TRACEBACK_SWITCH in stream.getvalue()
