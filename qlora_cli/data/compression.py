"""Open data files, also compressed ones (`.gz`, `.zst`)."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from qlora_cli.errors import InputError

COMPRESSED = (".gz", ".zst")
"""Suffixes of compressed files."""


def open_file(path: Path) -> BinaryIO:
    """Return the file's content, decompressed. Raises InputError if it cannot be opened."""
    try:
        if path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix.lower() == ".zst":
            return io.BytesIO(_read_zstd(path))
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Convert the errors of damaged compressed data to InputError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"damaged: {error}", where=str(path)) from error
    except Exception as error:
        # zstandard is optional, so its exception class cannot be named here.
        if type(error).__name__ != "ZstdError":
            raise
        raise InputError(f"damaged: {error}", where=str(path)) from error


def _read_zstd(path: Path) -> bytes:
    """Return the decompressed content. Its stream reader would not report a missing end."""
    if importlib.util.find_spec("zstandard") is None:
        raise InputError(
            "reading a .zst file needs the package zstandard",
            where=str(path),
            hint="pip install 'qlora-cli[zstd]', or decompress the file (`zstd -d`)",
        )
    zstandard = importlib.import_module("zstandard")
    parts, rest = [], path.read_bytes()
    with damage_reported(path):
        while rest:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(rest))
            if not frame.eof:
                raise EOFError("the compressed data ends too early")
            rest = frame.unused_data
    return b"".join(parts)
