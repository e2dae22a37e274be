"""Run the `qlora` command in this process and capture its output."""

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
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, parsed as one JSON object."""
        return json.loads(self.out)


def qlora(*arguments: str | Path, stdin: str = "") -> Outcome:
    """Run a command line. Its output is captured and does not reach the test's own streams."""
    out, err = io.StringIO(), io.StringIO()
    command = [str(argument) for argument in arguments]
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        code = main.run(command)
    return Outcome(code, out.getvalue(), err.getvalue())
