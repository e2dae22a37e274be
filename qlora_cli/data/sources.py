"""Find the files and datasets that `data.train` and `data.eval` name."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_cli.data.delimited import Item
from qlora_cli.data.hub_dataset import read_hub
from qlora_cli.data.readers import READERS, TEXT_SUFFIXES, file_type, read_file
from qlora_cli.errors import InputError
from qlora_cli.files.locate import STARTER, STARTER_FOLDER
from qlora_cli.files.paths import user_path

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True)
class Opened:
    """One file or dataset that rows can be read from.

    path: as the user wrote it, or the path of a file in a folder or pattern. name: the short name
    that origins of rows begin with. read: yields the items. is_file: False for a hub dataset.
    """

    path: str
    name: str
    read: Callable[[], Iterator[Item]]
    is_file: bool = True

    @property
    def size(self) -> int:
        """Return the file's size in bytes; 0 for a hub dataset."""
        return Path(self.path).stat().st_size if self.is_file else 0


def open_sources(places: Sequence[str]) -> list[list[Opened]]:
    """Return the files or datasets of each place, in order.

    places: paths of files, folders or patterns, hub ids, or `starter:...`. The files of a folder or
    pattern are sorted by path. Rows of files with equal names get the complete path as origin.
    Raises InputError if a place does not exist or a file's type is unknown.
    """
    opened = [_open(place) for place in places]
    paths: dict[str, set[str]] = {}
    for source in (source for sources in opened for source in sources):
        paths.setdefault(source.name, set()).add(source.path)
    return [
        [
            source if len(paths[source.name]) == 1 else replace(source, name=source.path)
            for source in sources
        ]
        for sources in opened
    ]


def _open(where: str) -> list[Opened]:
    if where.startswith(f"{STARTER}:"):
        return [_open_starter(where)]
    path = user_path(where)
    if path.is_file():
        return [_open_file(path)]
    if path.is_dir():
        return _open_folder(path)
    hub = _HUB_ID.fullmatch(where)
    if glob.has_magic(where) and not hub:
        return _open_pattern(str(path))
    if hub and file_type(path) is None:
        name, split = hub["name"], hub["split"] or "train"
        return [Opened(where, where, lambda: read_hub(name, split), is_file=False)]
    raise InputError(f"no file {path}", hint=_similar_files(path))


def _open_file(path: Path) -> Opened:
    if file_type(path) is None:
        raise InputError(
            f"unknown file type: {path}",
            hint=f"supported file names end in {', '.join(READERS)}, also followed by .gz or .zst "
            "(not Parquet)",
        )
    return Opened(str(path), path.name, lambda: read_file(path))


def _open_folder(folder: Path) -> list[Opened]:
    """Return the readable files in a folder, without those in its subfolders.

    Text files are left out if there are files of rows, because they describe the rows then.
    """
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in visible if path.is_file() and file_type(path) is not None]
    rows = [path for path in files if file_type(path) not in TEXT_SUFFIXES]
    if not files:
        raise InputError(
            f"{folder} is a folder without a data file",
            hint=f"supported file names end in {', '.join(READERS)}; files in subfolders are found "
            f"by a pattern such as {folder}/*/*.jsonl",
        )
    return [_open_file(path) for path in rows or files]


def _open_pattern(pattern: str) -> list[Opened]:
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise InputError(f"no file matches {pattern}")
    return [_open_file(path) for path in files]


def _open_starter(where: str) -> Opened:
    path = STARTER_FOLDER / f"{where.removeprefix(f'{STARTER}:')}.jsonl"
    if not path.is_file():
        raise InputError(
            f"no rows named {where!r}", hint="there are starter:train and starter:held_out"
        )
    return _open_file(path)


def _similar_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.iterdir() if file_type(entry) is not None)
    similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    if not similar:
        return f"{folder} contains no data file"
    return f"{folder} contains {', '.join(str(folder / name) for name in similar)}"
