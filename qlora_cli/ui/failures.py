"""An error on stderr: what is wrong, where, what to do. Printed once, in the error's own words."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from qlora_cli.errors import Interrupted, ProblemsError, QloraError

TRACEBACK_SWITCH = "QLORA_TRACEBACK"
"""Environment variable that asks for the traceback of any error."""


def show(error: QloraError, console: Console) -> None:
    """Prints one of the project's own errors."""
    if isinstance(error, Interrupted):
        _line(console, "stopped: ", "bold yellow", str(error.what))
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
    """Prints a fault of the program itself, and how to see where it happened."""
    _line(console, "unexpected error: ", "bold red", f"{type(error).__name__}: {error}")
    _line(console, "  ", "", f"this is a fault of qlora; {TRACEBACK_SWITCH}=1 shows where", "dim")


def _line(console: Console, lead: str, style: str, text: str, text_style: str = "") -> None:
    # soft_wrap: a path that is broken over two lines cannot be copied.
    console.print(Text.assemble((lead, style), (text, text_style)), soft_wrap=True)
