"""Run a job in a fork of the test, which has imported everything, and end it from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from qlora_cli.events import Silent
from qlora_cli.jobs import train
from qlora_cli.recipe.schema import Recipe


def in_process(job: Callable[[], object], seconds: float | None = None) -> bool:
    """Run a job in a fork, kill it after some time, and return whether it ended by itself."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.001)
    if deadline is not None:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) == 0


def training(recipe: Recipe) -> Callable[[], object]:
    """Return the job that begins the run or resumes it."""

    def job() -> object:
        resume = (Path(recipe.output) / "run.json").is_file()
        return train.run(recipe, recipe_path=None, resume=resume, observer=Silent())

    return job
