"""The two consoles: results go to stdout, everything else goes to stderr."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 100
"""Columns if the output goes to a file or a pipe and COLUMNS is not set."""


def results() -> Console:
    """Return a console for the current stdout, which tests and callers may have replaced."""
    return _console(sys.stdout)


def messages() -> Console:
    """Return a console for the current stderr."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # The terminal has a width of its own, and rich reads the variable COLUMNS.
    has_width = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    width = None if has_width else WIDTH_WITHOUT_TERMINAL
    # Highlighting would color every number. Here color always has a meaning.
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
