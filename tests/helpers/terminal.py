"""Run a command in a terminal of its own and type into it, as a person does."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.helpers.shared_data import ROOT

CTRL_C, CTRL_D, CTRL_U = "\x03", "\x04", "\x15"
QLORA = (sys.executable, "-m", "qlora_cli")
"""The command `qlora`."""
_SECONDS = 60
"""After this time without the expected output, the test fails."""


class Terminal:
    """A process whose streams are a pseudo-terminal. Use it in a `with` block, which ends it."""

    def __init__(self, *command: str | Path, **environment: str) -> None:
        self._master, slave = pty.openpty()
        # COLUMNS: wide enough that no message is broken over two lines.
        settings = {"PYTHONPATH": str(ROOT), "COLUMNS": "300", "TERM": "dumb"}
        self._process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, **settings, **environment},
            # Ctrl-C reaches the process only if this is its controlling terminal.
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Type a text. A newline is the Enter key."""
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """Return the output up to and with `text`; the next call continues after it."""
        self._read_until(lambda: text in self._unread, repr(text))
        before, found, self._unread = self._unread.partition(text)
        return before + found

    def wait_for_length(self, length: int) -> str:
        """Return the next output once it has at least this number of characters."""
        self._read_until(lambda: len(self._unread) >= length, f"{length} characters")
        output, self._unread = self._unread, ""
        return output

    def end(self, key: str = "") -> tuple[int, str]:
        """Return the exit code and the rest of the output.

        key: pressed once a second until the process ends. CPython handles a Ctrl-C that comes just
        before it waits for a line only at the next key.
        """
        while self._process.poll() is None and key:
            self.type(key)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        self._read_until(lambda: False, "the end", ends=True)
        return self._process.wait(_SECONDS), self._unread

    def _read_until(self, is_complete: Callable[[], bool], wanted: str, ends: bool = False) -> None:
        while not is_complete():
            ready, _, _ = select.select([self._master], [], [], _SECONDS)
            assert ready, f"no {wanted} in {self._unread!r}"
            try:
                piece = os.read(self._master, 4096)
            except OSError:  # Linux reports the end of a terminal's process this way.
                piece = b""
            if not piece:
                assert ends, f"ended without {wanted} in {self._unread!r}"
                return
            self._unread += piece.decode(errors="replace")
