"""The two consoles: results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 100
"""Columns, where the reader is a file or a pipe."""


def results() -> Console:
    """Stdout, as it is now: a test or a caller may have put another stream in its place."""
    return _console(sys.stdout)


def messages() -> Console:
    """Stderr, as it is now."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    # Highlighting colours every number it finds; here colour means something or is absent.
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
