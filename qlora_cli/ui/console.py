"""The two consoles: results go to stdout, everything else goes to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

WIDTH_WITHOUT_TERMINAL = 100
"""Columns if the output goes to a file or a pipe and COLUMNS is not set."""

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_CONTROLS |= {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)
# These change the order in which the text after them is shown.
_CONTROLS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
"""Code of a control character, or of half a character -> code of what is shown in its place."""


def printable(text: str) -> str:
    """Return text in which control characters are replaced by visible ones.

    A terminal would obey them: text from a file could move the cursor or change the title.
    """
    return text.translate(_CONTROLS)


class _SafeConsole(Console):
    """A console on which the text of a file cannot control the terminal; rich itself still can."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


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
    return _SafeConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)
