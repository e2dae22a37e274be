"""Sources of a base's tensors: a folder of safetensors files, or meta tensors for a dry run.

Tensors are requested by the model's parameter names (`model.layers.0.self_attn.q_proj.weight`). The
names in a file may differ: GPT-2's checkpoint on the hub lacks the prefix of the backbone.
`FolderSource` maps between the two, because a merge writes the names of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import PARSE_ERRORS, read_json
from qlora_cli.files.bitsandbytes_weights import with_weights
from qlora_cli.files.checksums import cached_sha256
from qlora_cli.files.mxfp4 import with_stacks
from qlora_cli.files.packed_entry import PackedEntry, StoredFormat
from qlora_cli.files.safetensors_io import TensorEntry, is_finite, read_header, read_tensor

WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_END_BYTES = 4096
"""Bytes at each end of a tensor that enter the fingerprint of an older version."""
_ALL_BYTES = "all:"
"""Beginning of a fingerprint over all bytes."""
_MAX_NAME = 255
"""Number of characters that the name of a file can have."""
_THREADS = 4
"""Files that are hashed at the same time."""


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    def names(self) -> Sequence[str]:
        """Return the parameter names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape in the file."""

    def read(self, name: str) -> Tensor:
        """Return the tensor in the file's orientation, on the CPU, or on meta in a dry run."""


class FolderSource:
    """The tensors of a folder's safetensors files under the model's parameter names.

    folder: a single-file or sharded checkpoint.
    rename: returns the parameter's name for the name of a tensor in the files.
    ignored: endings of the names of file tensors that are buffers and are not loaded.
    uses: returns whether a tensor is of the model, by its parameter's name and its shape.

    Raises ModelError if files are missing or damaged, or if two tensors have one parameter.
    """

    def __init__(
        self,
        folder: Path,
        rename: Callable[[str], str],
        ignored: Iterable[str] = (),
        uses: Callable[[str, tuple[int, ...]], bool] = lambda *_: True,
    ) -> None:
        self.folder = folder
        self.entries = with_stacks(with_weights(read_folder(folder)))
        endings = tuple(ignored)
        self.ignored = [
            name
            for name, entry in self.entries.items()
            if (endings and name.endswith(endings)) or not uses(rename(name), entry.shape)
        ]
        ignored = set(self.ignored)
        self._file_names: dict[str, str] = {}
        for name in self.entries:
            if name in ignored:
                continue
            other = self._file_names.setdefault(rename(name), name)
            if other != name:
                raise ModelError(
                    f"the tensors {other} and {name} belong to one parameter, which this package "
                    "does not support",
                    where=str(folder),
                )

    def names(self) -> Sequence[str]:
        """Return the parameter names in the order of the files."""
        return list(self._file_names)

    def file_name(self, name: str) -> str:
        """Return the tensor's name in the checkpoint."""
        return self._file_names[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape in the file."""
        return self.entry(name).shape

    def entry(self, name: str) -> TensorEntry:
        """Return the tensor's location and form in the checkpoint."""
        return self.entries[self._file_names[name]]

    def read(self, name: str) -> Tensor:
        """Read the tensor into CPU memory of its own size.

        Raises ModelError if a value is NaN or infinite: every result would be, too.
        """
        entry = self.entry(name)
        tensor = entry.read() if isinstance(entry, PackedEntry) else read_tensor(entry)
        self._check_finite(name, tensor)
        return tensor

    def stored_format(self, name: str) -> StoredFormat | None:
        """Return the form of a weight that the checkpoint stores quantized; None for others."""
        entry = self.entry(name)
        return entry.stored_format() if isinstance(entry, PackedEntry) else None

    def read_stored(self, name: str) -> dict[str, Tensor]:
        """Return a weight that has a stored format, without dequantizing it.

        Raises ModelError if a scale is NaN or infinite.
        """
        entry = self.entry(name)
        assert isinstance(entry, PackedEntry)
        tensors = entry.stored()
        for tensor in tensors.values():
            self._check_finite(name, tensor)
        return tensors

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise ModelError(
                f"{self.file_name(name)} of the base has values that are not finite",
                where=str(self.entry(name).file),
                hint="the base is damaged; download it again",
            )


class OverlaidSource(FolderSource):
    """The tensors of a folder, of which some are replaced or added by tensors of another file.

    base: the source under them. others: parameter name -> entry. In a merge every tensor has its
    parameter's name, because the others have no name in the folder.
    """

    def __init__(self, base: FolderSource, others: Mapping[str, TensorEntry]) -> None:
        self.folder = base.folder
        self.ignored = base.ignored
        self.entries = {name: base.entry(name) for name in base.names()} | dict(others)
        self._file_names = {name: name for name in self.entries}


class InitializedSource:
    """The tensors of a source, and new ones that are in no file.

    base: the source. new: name -> tensor on the CPU; those that `base` has are not used.
    """

    def __init__(self, base: FolderSource, new: Mapping[str, Tensor]) -> None:
        self.base = base
        known = set(base.names())
        self.new = {name: tensor for name, tensor in new.items() if name not in known}

    def names(self) -> Sequence[str]:
        """Return the names of all tensors, the new ones last."""
        return [*self.base.names(), *self.new]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape."""
        return tuple(self.new[name].shape) if name in self.new else self.base.shape(name)

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU. Errors as of the source under it."""
        return self.new[name].clone() if name in self.new else self.base.read(name)


def fingerprint(folder: Path, like: str | None = None) -> str:
    """Return a text that identifies a checkpoint's weights: a SHA-256 over all bytes of its files.

    The checksums of large files are kept in the cache, so that only the first call reads them.
    like: an earlier fingerprint, to compare with; if an older version made it, the result covers
    the same bytes as that one. Raises ModelError if files are missing or damaged.
    """
    if like is not None and not like.startswith(_ALL_BYTES):
        return _fingerprint_of_ends(folder)
    read_folder(folder)  # Refuses damaged headers.
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(cached_sha256, files))
    lines = (f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return _ALL_BYTES + hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weights. Raises ModelError if files are damaged."""
    return sum(entry.num_bytes for entry in read_folder(folder).values())


def config_digest(folder: Path) -> str:
    """Return a SHA-256 of the settings in a model's config.json. Raises ModelError if damaged."""
    content = read_json(folder / "config.json", dict, ModelError)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint_of_ends(folder: Path) -> str:
    """Return the fingerprint of older versions: names, dtypes, shapes and the ends of tensors."""
    digest = hashlib.sha256()
    for name, entry in sorted(read_folder(folder).items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        size = min(_END_BYTES, entry.num_bytes)
        with entry.file.open("rb") as stream:
            for start in (entry.start, entry.start + entry.num_bytes - size):
                stream.seek(start)
                digest.update(stream.read(size))
    return digest.hexdigest()


def read_folder(folder: Path) -> dict[str, TensorEntry]:
    """Return file name -> entry of each tensor of a checkpoint folder, in the order of the files.

    Raises ModelError if files are missing or damaged.
    """
    entries: dict[str, TensorEntry] = {}
    for file in _files(folder):
        entries_of_file, _ = read_header(file)
        entries.update(sorted(entries_of_file.items(), key=lambda item: item[1].start))
    return entries


def check_index(folder: Path) -> None:
    """Raise ModelError if a folder's index is damaged, or if some of its files are missing.

    A folder without any weight file is accepted: a plan does not need them.
    """
    if not (folder / WEIGHTS_INDEX).is_file():
        return
    files = _named_files(folder)
    if any(file.is_file() for file in files):
        _check_present(folder, files)


def _files(folder: Path) -> list[Path]:
    """Return the weight files. Raises ModelError if one is missing or the index is damaged."""
    files = _named_files(folder)
    _check_present(folder, files)
    return files


def _named_files(folder: Path) -> list[Path]:
    """Return the weight files, which may be missing.

    A single file has precedence over an index, as in transformers.
    """
    index = folder / WEIGHTS_INDEX
    if not index.is_file() or (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
    except PARSE_ERRORS as fault:
        raise ModelError(f"damaged index: {str(fault)[:200]}", where=str(index)) from fault
    for name in names:
        if not isinstance(name, str) or len(name) > _MAX_NAME or _is_outside(name):
            what = f"damaged index: {str(name)[:60]} is not a file in this folder"
            raise ModelError(what, where=str(index))
    return [folder / name for name in names]


def _check_present(folder: Path, files: Sequence[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"missing {', '.join(missing)}",
            where=str(folder),
            hint=f"it contains {pickled[0]}; pickled weights are not read, convert them to "
            "safetensors"
            if pickled
            else "download the complete folder again",
        )


def _is_outside(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts
