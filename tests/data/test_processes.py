"""Processes that tokenize rows: their terminal is closed, or they end at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

JOB = """
import signal, time
from qlora_cli.data.processes import workers
from qlora_cli.errors import QloraError

def end(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGHUP, end)
try:
    with workers(time.sleep, 2) as apply:
        for _ in apply([0, 600, 600]):
            print("ready", flush=True)
except (KeyboardInterrupt, QloraError):
    print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_a_hangup_of_all_processes_prints_nothing() -> None:
    """A closed terminal sends SIGHUP to the workers and to Python's resource tracker, too."""
    job = subprocess.Popen(
        [sys.executable, "-c", JOB],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    os.killpg(job.pid, signal.SIGHUP)
    out, err = job.communicate(timeout=120)
    assert (job.returncode, out, err) == (0, "ended\n", "")


FAILING = """
import sys
from functools import partial
from qlora_cli.data.processes import workers
from qlora_cli.errors import QloraError

try:
    # A process imports the main module again, and fails: this one has no file.
    with workers(partial(max, "a" * int(sys.argv[1])), 2) as apply:
        list(apply(["b", "c"]))
except QloraError as error:
    print(error.hint)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 50_000_000], ids=["small", "larger than a pipe"])
def test_processes_that_end_at_once_are_one_error(size: int) -> None:
    job = subprocess.run(
        [sys.executable, "-", str(size)], input=FAILING, capture_output=True, text=True, timeout=120
    )
    assert "set data.processes to a smaller number" in job.stdout, job.stderr
