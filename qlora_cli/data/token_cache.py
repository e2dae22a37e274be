"""Tokenized data sets in the cache: what they depend on, writing and reading them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from qlora_cli.data.encoded import SCHEMA, EncodedRows
from qlora_cli.data.mixture import SourceCount, sources_of, sources_text
from qlora_cli.data.sources import Opened, open_sources
from qlora_cli.data.text_checks import RowFaults
from qlora_cli.errors import InputError
from qlora_cli.files.atomic import PARSE_ERRORS, report_write_errors
from qlora_cli.files.cache import ENTRY, TOKENS, entry_folder, key_of
from qlora_cli.recipe.schema import Data, DataFormat, Source

_LAYOUT = 5
"""Version of the files of an entry, and of the choice of its rows."""
_MIN_BYTES = 8 * 1024**2
"""Size of the data files from which on tokens are kept; fewer are tokenized in a few seconds."""
_PACKAGES = ("qlora-cli", "transformers", "tokenizers", "jinja2")
"""Packages whose version may change the tokens."""
_SETTINGS = {"format", "system", "columns", "max_rows", "seed"}
"""Settings that the rows and their tokens depend on; `template` is in the tokenizer."""
PART_FILES = ("train.arrow", "held_out.arrow")
_HINT = "free disk space, name a folder on another disk with QLORA_CACHE, or set data.cache=false"


@dataclass(frozen=True)
class EncodedPart:
    """The training rows or the held-out rows.

    formats: format and number of consecutive rows. faults: of the texts of the rows.
    """

    rows: EncodedRows
    formats: tuple[tuple[DataFormat, int], ...]
    faults: RowFaults


@dataclass(frozen=True)
class EncodedData:
    """All rows of a recipe before `data.long_rows` applies. sources: of the training rows."""

    train: EncodedPart
    held_out: EncodedPart | None
    sources: tuple[SourceCount, ...]


@dataclass(frozen=True)
class CacheKey:
    """The place of a recipe's tokens in the cache.

    folder: of the entry. description: for the user. files: the data files with size and time of
    change when their content was read for the key.
    """

    folder: Path
    description: str
    files: tuple[tuple[Path, int, int], ...]

    @property
    def num_bytes(self) -> int:
        """Return the size of the data files."""
        return sum(size for _, size, _ in self.files)

    def check_unchanged(self) -> None:
        """Raise InputError if a data file has changed since the key was computed."""
        for path, *facts in self.files:
            if _facts(path) != (path, *facts):
                raise InputError(
                    "the file changed while its rows were read", where=str(path), hint="try again"
                )


def key_for(data: Data, tokenizer: Any, vocab_size: int | None, encode: Any) -> CacheKey | None:
    """Return the place of a recipe's tokens; None if they are not kept.

    They are not kept if `data.cache` is false, the files are small or cannot be read, or rows are
    from a hub dataset. encode: the function of the task.
    """
    if not data.cache:
        return None
    try:
        train = open_sources([source.path for source in sources_of(data.train)])
        held_out = open_sources([source.path for source in _held_out_sources(data)])
        files = [file for source in (*train, *held_out) for file in source]
        if not all(file.is_file for file in files) or sum(f.size for f in files) < _MIN_BYTES:
            return None
        facts = tuple(_facts(Path(file.path)) for file in files)
        contents = [[_content(file) for file in source] for source in (*train, *held_out)]
    except (InputError, OSError):
        return None  # Reading the rows reports it.
    parts = {
        "layout": _LAYOUT,
        "versions": {name: version(name) for name in _PACKAGES},
        "settings": data.model_dump(mode="json", include=_SETTINGS),
        "weights": [source.weight for source in sources_of(data.train)],
        "share": data.eval if isinstance(data.eval, float) else None,
        "contents": contents,
        "tokenizer": _tokenizer_facts(tokenizer),
        "vocab_size": vocab_size,
        "encode": f"{encode.__module__}.{getattr(encode, '__qualname__', repr(encode))}",
    }
    description = f"{sources_text(data.train)} for {getattr(tokenizer, 'name_or_path', None)}"
    return CacheKey(entry_folder(TOKENS, key_of(parts)), description, facts)


def _held_out_sources(data: Data) -> list[Source]:
    return [] if data.eval is None or isinstance(data.eval, float) else sources_of(data.eval)


def _facts(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


def _content(file: Opened) -> tuple[str, str]:
    """Return the name in the origins of a file's rows, and the hash of its content."""
    with Path(file.path).open("rb") as stream:
        return file.name, hashlib.file_digest(stream, "sha256").hexdigest()


def _tokenizer_facts(tokenizer: Any) -> Any:
    """Return everything about the tokenizer that the tokens of a row depend on."""
    if tokenizer is None:
        return None
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    # transformers sets these two at each call.
    inner = {key: value for key, value in inner.items() if key not in ("truncation", "padding")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template
    today = str(date.today()) if "strftime_now" in str(template) else None
    return [type(tokenizer).__name__, key_of(inner), special, template, today]


def read_entry(key: CacheKey, data: Data) -> EncodedData | None:
    """Return the tokens of an entry, mapped from its files; None if it is absent or damaged."""
    try:
        content = json.loads((key.folder / ENTRY).read_text())
        train = _read_part(key.folder, content["train"])
        held_out = content["held_out"] and _read_part(key.folder, content["held_out"])
        counts = zip(sources_of(data.train), content["counts"], strict=True)
        sources = tuple(SourceCount(item.path, item.weight, *count) for item, count in counts)
        return EncodedData(train, held_out, sources)
    except (OSError, pa.ArrowException, *PARSE_ERRORS):
        return None


def write_entry(folder: Path, key: CacheKey, data: EncodedData, checksums: Sequence[int]) -> None:
    """Write `entry.json` into the folder of a new entry, which contains the files of its parts.

    checksums: of the files of the training rows and of the held-out rows.
    """
    parts = [data.train, *([data.held_out] if data.held_out else [])]
    described = [
        {
            "file": name,
            "checksum": checksum,
            "names": part.rows.names,
            "formats": part.formats,
            "faults": asdict(part.faults),
        }
        for name, checksum, part in zip(PART_FILES, checksums, parts, strict=False)
    ]
    content = {
        "description": key.description,
        "train": described[0],
        "held_out": described[1] if data.held_out else None,
        "counts": [(source.read, source.used) for source in data.sources],
    }
    with write_errors(key.folder):
        (folder / ENTRY).write_text(json.dumps(content))


def write_errors(folder: Path) -> AbstractContextManager[None]:
    """Convert an OSError while the entry in `folder` is written to a QloraError."""
    return report_write_errors("the tokenized rows", folder, _HINT)


def _read_part(folder: Path, content: dict[str, Any]) -> EncodedPart:
    path = folder / content["file"]
    if _checksum(path) != content["checksum"]:
        raise ValueError("the checksum differs")
    formats = tuple((name, number) for name, number in content["formats"])
    faults = RowFaults(**content["faults"])
    return EncodedPart(mapped(path, content["names"]), formats, faults)


def mapped(path: Path, names: Sequence[str]) -> EncodedRows:
    """Return the rows in a file without reading them into memory. names: of their files."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return EncodedRows(list(reader), names)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


class _Writer:
    """A binary file that computes the checksum of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.checksum = 0
        self.closed = False

    def write(self, content: Any) -> int:
        self.checksum = zlib.crc32(content, self.checksum)
        return self._file.write(content)


def write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """Write record batches to a file and return its checksum.

    Raises QloraError if the disk is full, and what `batches` raises.
    """
    with path.open("wb") as file:
        checked = _Writer(file)
        sink = pa.PythonFile(checked, mode="w")
        writer = pa.ipc.new_stream(sink, SCHEMA)
        for batch in batches:
            with write_errors(path.parent):
                writer.write_batch(batch)
        with write_errors(path.parent):
            writer.close()
            file.flush()
    return checked.checksum
