"""Paths that the user wrote."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_cli.errors import UsageError

_MAX_NAME_BYTES = 255
"""Length of a file's name that common file systems allow."""


def user_path(text: str | Path) -> Path:
    """Return a path that the user wrote, with the home folder for `~`.

    `~name` of an unknown user stays as it is. Raises UsageError if it cannot be a path.
    """
    path = Path(os.path.expanduser(text))
    try:
        too_long = any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts)
    except UnicodeEncodeError as fault:
        raise UsageError(f"{str(path)[:60]!r} is not a path: {fault.reason}") from fault
    if too_long or "\0" in str(path):
        reason = f"a name in it has more than {_MAX_NAME_BYTES} bytes" if too_long else "it has NUL"
        raise UsageError(f"{str(path)[:60]!r}... is not a path: {reason}")
    return path
