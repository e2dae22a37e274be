"""Print an error on stderr: what is wrong, where, and what to do. Each error is printed once."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from qlora_cli.errors import Interrupted, ProblemsError, QloraError

TRACEBACK_SWITCH = "QLORA_TRACEBACK"
"""Environment variable that turns on the traceback of every error."""


def show(error: QloraError, console: Console) -> None:
    """Print an error that qlora itself raised, with all its problems and hints."""
    if isinstance(error, Interrupted):
        _line(console, "interrupted: ", "bold yellow", str(error.what))
    else:
        place = f"{error.where}: " if error.where else ""
        _line(console, "error: ", "bold red", f"{place}{error.what}")
    if isinstance(error, ProblemsError):
        for problem in error.problems:
            _line(console, f"  {problem.where}: ", "bold", problem.what)
            if problem.hint:
                _line(console, "    ", "", problem.hint, "dim")
    if error.hint:
        _line(console, "  ", "", error.hint, "dim")


def show_unexpected(error: Exception, console: Console) -> None:
    """Print an error that is a bug of qlora, and how to get its traceback."""
    _line(console, "unexpected error: ", "bold red", f"{type(error).__name__}: {error}")
    hint = f"this is a bug in qlora; set {TRACEBACK_SWITCH}=1 to see where it happened"
    _line(console, "  ", "", hint, "dim")


def _line(console: Console, lead: str, style: str, text: str, text_style: str = "") -> None:
    # soft_wrap: a path that is broken over two lines cannot be copied.
    console.print(Text.assemble((lead, style), (text, text_style)), soft_wrap=True)
