"""The folder of results that are kept between runs because computing them takes long.

Each entry is a folder `KIND/KEY` with a file `entry.json`, whose `description` is shown to the
user. Files appear complete or not at all. The key contains everything that the content depends on,
so only a measured speed is ever updated.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.files.lock import locked_file
from qlora_cli.files.paths import user_path

SWITCH = "QLORA_CACHE"
"""Environment variable that names another folder."""
ENTRY = "entry.json"
TOKENS = "tokens"
PROOFS = "proofs"
SPEEDS = "speeds"
DEVICES = "devices"
CHECKSUMS = "checksums"
PACKED = "packed"
MIXES = "mixes"
KINDS = {
    TOKENS: "tokenized data",
    PROOFS: "proofs of model types",
    SPEEDS: "speeds of finished runs",
    DEVICES: "speeds of devices",
    CHECKSUMS: "checksums of model files",
    PACKED: "packed bases",
    MIXES: "chosen bits of bases",
}
"""Kind -> what its entries are. A new kind is one entry here."""
_LOCK_SUFFIX = ".lock"


@dataclass(frozen=True)
class CacheEntry:
    """One entry. description: what it was made of. bytes: size of its files."""

    kind: str
    key: str
    description: str
    bytes: int


def cache_root() -> Path:
    """Return `$QLORA_CACHE`, else the folder `qlora` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if named := os.environ.get(SWITCH):
        return user_path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else user_path("~/.cache")) / "qlora"


def entry_folder(kind: str, key: str) -> Path:
    """Return the folder of an entry, which may not exist."""
    return cache_root() / kind / key


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key of an entry whose content depends on `parts`, which JSON can represent."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of an entry, so that only one process writes it.

    wait: wait for another process that holds it; otherwise yield False if there is one.
    As `locked_file`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}{_LOCK_SUFFIX}"
    with locked_file(lock, wait=wait) as is_free:
        yield is_free


def entries() -> list[CacheEntry]:
    """Return all entries, by kind and description."""
    found = [
        CacheEntry(kind, folder.name, _description(folder), _size(folder))
        for kind in KINDS
        for folder in _folders(cache_root() / kind)
        if not folder.name.startswith(".")
    ]
    return sorted(found, key=lambda entry: (entry.kind, entry.description, entry.key))


def clear() -> list[CacheEntry]:
    """Remove all entries and what killed processes left, and return the entries.

    Entries that another process writes now are kept. A process that uses a removed entry is not
    disturbed, because the system keeps open files.
    """
    removed = [entry for entry in entries() if remove(entry)]
    for kind in KINDS:
        _remove_hidden(cache_root() / kind)
    return removed


def remove(entry: CacheEntry) -> bool:
    """Remove an entry, unless another process writes it. Return whether it was removed."""
    folder = entry_folder(entry.kind, entry.key)
    with locked(folder, wait=False) as is_free:
        if is_free:
            shutil.rmtree(folder)
    return is_free


def _remove_hidden(folder: Path) -> None:
    """Remove unfinished entries, and the locks that no process holds."""
    keys = {path.name.split(".")[1] for path in _all(folder) if path.name.startswith(".")}
    for key in keys:
        with locked(folder / key, wait=False) as is_free:
            if is_free:
                for path in _all(folder):
                    if path.name.startswith(f".{key}."):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _folders(folder: Path) -> list[Path]:
    return [path for path in _all(folder) if path.is_dir()]


def _all(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _description(folder: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder / ENTRY).read_text())["description"])
    return "damaged"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
