"""SHA-256 of written files, by which damage is detected before they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.files import cache
from qlora_cli.files.atomic import PARSE_ERRORS, read_json, write_json

_LARGE_BYTES = 64 * 1024**2
"""Hashing a smaller file takes less time than a person notices."""
CHECKSUMS = "checksums.json"
"""Name of the file with the checksums of the other files in its folder."""


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content. Raises OSError if it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content; of a large file it is kept in the cache.

    A file counts as unchanged if its path, size and time of change are the same. Raises OSError if
    the file cannot be read.
    """
    stat = file.stat()
    if stat.st_size < _LARGE_BYTES:
        return sha256_of(file)
    facts = {"file": str(file.resolve()), "size": stat.st_size, "time": stat.st_mtime_ns}
    entry = cache.entry_folder(cache.CHECKSUMS, cache.key_of(facts)) / cache.ENTRY
    with suppress(OSError, *PARSE_ERRORS):
        return str(json.loads(entry.read_text())["sha256"])
    digest = sha256_of(file)
    with suppress(OSError):  # Without a cache, the file is read again the next time.
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_json(entry, {"description": str(file), "sha256": digest})
    return digest


def checksums_of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the path relative to `folder` -> SHA-256 of some files. Linked files are read once."""
    known: dict[tuple[int, int], str] = {}
    result: dict[str, str] = {}
    for file in sorted(files):
        stat = file.stat()
        place = stat.st_dev, stat.st_ino
        if place not in known:
            known[place] = sha256_of(file)
        result[file.relative_to(folder).as_posix()] = known[place]
    return result


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a folder into it. Raises OSError if the disk is full."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    write_json(folder / CHECKSUMS, {"sha256": checksums_of(folder, files)})


def damage(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Return one line per file that is missing or not as it was written.

    expected: path relative to `folder` -> SHA-256.
    """
    found = []
    for name, digest in expected.items():
        try:
            if sha256_of(folder / name) != digest:
                found.append(f"{name} is not as it was written: its SHA-256 differs")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror or error}")
    return found


def damage_of_folder(folder: Path, part: str = "") -> list[str]:
    """Return the damage of a folder that has a checksums file; none without such a file.

    part: check only files whose relative path begins with it.
    """
    if not (folder / CHECKSUMS).is_file():
        return []
    try:
        expected = read_json(
            folder / CHECKSUMS, lambda content: dict(content["sha256"]), ModelError
        )
    except ModelError as error:
        return [error.what]
    return damage(folder, {name: sha for name, sha in expected.items() if name.startswith(part)})
