"""`qlora` in this process, with what it wrote."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from qlora_cli.cli import main


@dataclass(frozen=True)
class Outcome:
    """Exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as the one JSON object that it must be."""
        return json.loads(self.out)


def qlora(*arguments: str | Path, stdin: str = "") -> Outcome:
    """Runs a command line; nothing of it escapes to the test's own streams."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        code = main.run(words)
    return Outcome(code, out.getvalue(), err.getvalue())
