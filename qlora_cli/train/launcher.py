"""Starts the processes of `qlora train --processes N` on this machine, and ends all if one ends.

The environment is the one that accelerate's launcher gives its processes, so `accelerate launch`
can be used instead. It is not called here, because it kills its processes 30 seconds after Ctrl-C,
and a step and its checkpoint can take longer.

The main process has rank 0 and keeps the terminal; the others write to logs. Each process has a
session of its own, so that Ctrl-C reaches only the launcher, which passes it to the main process.
All processes agree after each step whether to stop.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from qlora_cli.errors import QloraError, UsageError

_PARENT = "QLORA_LAUNCHER"
"""Environment variable with the process id of the launcher."""
_GRACE_SECONDS = 10.0
"""Time that the other processes have to end after one has ended."""
_POLL_SECONDS = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOG_LINES = 5
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


@dataclass(frozen=True)
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None


_QLORA = (sys.executable, "-m", "qlora_cli")


def check_no_launcher() -> None:
    """Raise UsageError if a launcher has started this process, which can start no others then."""
    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            "another launcher has started this process already",
            where="--processes",
            hint="leave --processes out with `accelerate launch`",
        )


def launch(arguments: Sequence[str], number: int, command: Sequence[str] = _QLORA) -> int:
    """Run `command` with `arguments` in `number` processes and return the exit code of the job.

    Raises QloraError if another process than the main one fails, with the end of its log.
    """
    logs = Path(tempfile.mkdtemp(prefix="qlora-processes-"))
    with reserved_port() as port:
        children = _start([*command, *arguments], number, logs, port)
        with _forwarded(children[0].process):
            first = _wait_for_any(children)
            _end(children)
    code = children[0].process.returncode
    lines = _last_lines(first)
    if not lines:
        shutil.rmtree(logs, ignore_errors=True)
    if code >= 0 and (first.rank == 0 or (first.process.returncode > 0 and not lines)):
        # The main process has reported the error of all, or its own.
        return code
    raise _failure(first, number, lines)


def end_with_launcher() -> None:
    """Make the system send SIGTERM to this process when its launcher ends, even by SIGKILL.

    Does nothing in a process without a launcher, and on systems other than Linux.
    """
    parent = os.environ.get(_PARENT)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # It has ended before.
        os.kill(os.getpid(), signal.SIGTERM)


def _start(command: Sequence[str], number: int, logs: Path, port: int) -> list[_Child]:
    """Start the processes, the main one first. port: at which they meet."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        _PARENT: str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    children: list[_Child] = []
    for rank in range(number):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = logs / f"process-{rank}.log" if rank else None
        with open(log or os.devnull, "wb") as stream:
            process = subprocess.Popen(
                command,
                env=own,
                stdin=subprocess.DEVNULL if rank else None,
                stdout=stream if rank else None,
                stderr=stream if rank else None,
                start_new_session=True,
            )
        children.append(_Child(rank, process, log))
    return children


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port at which processes can meet, and which no other program takes in the block.

    A socket that does not listen has the port. `SO_REUSEADDR` lets the main process listen at it
    nevertheless, because it sets that option, too.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        # Only now, so that the system does not choose the port of another such socket.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]


@contextmanager
def _forwarded(main: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass the signals that end a job to the main process inside the block."""

    def forward(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            main.send_signal(number)

    previous = {}
    with suppress(ValueError):  # Only the main thread may set signal handlers.
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_any(children: Sequence[_Child]) -> _Child:
    """Wait until a process fails, or the main one ends. Return it; one that was killed first."""
    while True:
        ended = [child for child in children if child.process.poll() is not None]
        failed = [child for child in ended if child.process.returncode != 0]
        if failed:
            return min(failed, key=lambda child: child.process.returncode)
        if children[0] in ended:
            return children[0]
        time.sleep(_POLL_SECONDS)


def _end(children: Sequence[_Child]) -> None:
    """Wait until all processes have ended, and end those that do not."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for end in (None, signal.SIGKILL):
        for child in children:
            if end is not None and child.process.poll() is None:
                with suppress(ProcessLookupError):
                    child.process.send_signal(end)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(None if end else max(0.0, deadline - time.monotonic()))


def _failure(child: _Child, number: int, lines: Sequence[str]) -> QloraError:
    """Return the error for a process that failed. lines: the last ones of its log."""
    code = child.process.returncode
    ending = f"ended with exit code {code}"
    if code < 0:
        ending = f"was ended by {signal.Signals(-code).name}"
    what = f"process {child.rank} of {number} {ending}, so the others were ended too"
    hints = []
    if code == -signal.SIGKILL:
        hints.append("the system kills a process if host memory is short")
    if lines:
        hints.append(f"its log is {child.log}; its last lines: {' | '.join(lines)}")
    hints.append("continue the run with --resume")
    return QloraError(what, hint="; ".join(hints))


def _last_lines(child: _Child) -> list[str]:
    """Return the last lines of a log; of a process that was killed, there may be none."""
    if child.log is None:
        return []
    text = child.log.read_text(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()][-_LOG_LINES:]
