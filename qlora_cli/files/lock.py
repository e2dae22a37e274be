"""A lock on a file. It ends with the process that holds it, so that a crash leaves none behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked_file(file: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of `file`, which is created. Yield whether this process has the lock.

    wait: wait for another process that holds it; otherwise yield False if there is one. File
    systems without locks, and systems other than POSIX, are used without a lock. Raises OSError if
    the file cannot be created.
    """
    with file.open("a") as stream:
        yield _lock(stream, wait)


def _lock(stream: IO[str], wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:
        return True  # Not a POSIX system.
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
