"""Where a base's tensors come from: safetensors files, or imagination for a plan.

Names here are the model's own parameter names (`model.layers.0.self_attn.q_proj.weight`). A file
may leave out or add the backbone's prefix, as GPT-2's on the hub does; `FolderSource` finds the
tensor and remembers its own name, which merging writes again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.safetensors_io import TensorEntry, read_header, read_tensor

WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_END_BYTES = 4096


class TensorSource(Protocol):
    """Tensors by name, read one at a time."""

    def names(self) -> Sequence[str]:
        """Every tensor."""

    def shape(self, name: str) -> tuple[int, ...]:
        """As it lies in the file."""

    def read(self, name: str) -> Tensor:
        """On the host, or on meta where it is imagined."""


class FolderSource:
    """A folder's safetensors, single or sharded, renamed to the model's parameters.

    prefix: the backbone's, with its dot. ignored: endings of tensors that are buffers. Raises
    ModelError where files are missing or damaged.
    """

    def __init__(
        self, folder: Path, *, prefix: str, head: str, ignored: Iterable[str] = ()
    ) -> None:
        self.folder = folder
        self.entries = read_folder(folder)
        endings = tuple(ignored)
        self.ignored = [name for name in self.entries if endings and name.endswith(endings)]
        self._file_names = {
            _model_name(name, prefix, head): name
            for name in self.entries
            if name not in set(self.ignored)
        }

    def names(self) -> Sequence[str]:
        """In the order of the files."""
        return list(self._file_names)

    def file_name(self, name: str) -> str:
        """The tensor's name in the checkpoint."""
        return self._file_names[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """As it lies in the file."""
        return self.entry(name).shape

    def entry(self, name: str) -> TensorEntry:
        """Where it lies."""
        return self.entries[self._file_names[name]]

    def read(self, name: str) -> Tensor:
        """On the host, holding memory of its own size."""
        return read_tensor(self.entry(name))


def fingerprint(folder: Path) -> str:
    """SHA-256 of what tells a checkpoint from another: each tensor's name, form and both ends.

    Not of every byte, which takes as long as loading. Raises ModelError.
    """
    found = hashlib.sha256()
    for name, entry in sorted(read_folder(folder).items()):
        found.update(f"{name} {entry.dtype} {entry.shape}".encode())
        size = min(_END_BYTES, entry.num_bytes)
        with entry.file.open("rb") as stream:
            for start in (entry.start, entry.start + entry.num_bytes - size):
                stream.seek(start)
                found.update(stream.read(size))
    return found.hexdigest()


def read_folder(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder, ordered by file and place. Raises ModelError."""
    entries: dict[str, TensorEntry] = {}
    for file in _files(folder):
        found, _ = read_header(file)
        entries.update(sorted(found.items(), key=lambda item: item[1].start))
    return entries


def _files(folder: Path) -> list[Path]:
    """Where both are there, a single file goes before an index, as with transformers."""
    index = folder / WEIGHTS_INDEX
    if index.is_file() and not (folder / WEIGHTS_FILE).is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as fault:
            raise ModelError(f"damaged index: {fault!r}", where=str(index)) from fault
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS_FILE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        old = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"missing {', '.join(missing)}",
            where=str(folder),
            hint=f"it holds {old[0]}; pickled weights are not read, convert them to safetensors"
            if old
            else "fetch the whole folder again",
        )
    return files


def _model_name(name: str, prefix: str, head: str) -> str:
    if name.startswith((prefix, head + ".")):
        return name
    return prefix + name
