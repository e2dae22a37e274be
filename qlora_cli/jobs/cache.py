"""`qlora cache list` and `qlora cache clear`: what is kept between runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import QloraError
from qlora_cli.files.cache import CacheEntry, cache_root, clear, entries
from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class CacheResult(Result):
    """Result of `qlora cache`. folder: of the cache. entries: what it contains, or contained.

    bytes: size of all entries. cleared: whether the entries were removed.
    """

    folder: Path
    entries: tuple[CacheEntry, ...]
    bytes: int
    cleared: bool


def run(*, remove: bool) -> CacheResult:
    """Return the entries of the cache, after removing them if `remove`.

    Raises QloraError if an entry cannot be removed.
    """
    folder = cache_root()
    try:
        found = tuple(clear() if remove else entries())
    except OSError as error:
        raise QloraError(
            f"the cache cannot be {'cleared' if remove else 'read'}: {error.strerror}",
            where=str(error.filename or folder),
        ) from error
    return CacheResult(folder, found, sum(entry.bytes for entry in found), remove)
