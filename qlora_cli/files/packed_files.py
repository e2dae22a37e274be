"""The files of a packed base: safetensors shards, and the checksum of each tensor in `entry.json`.

A tensor is mapped from its shard and not read into memory of the process: the system loads a page
when it is used and can drop it again. The mapping is private, so that writing to a tensor changes
no file.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import PARSE_ERRORS
from qlora_cli.files.cache import ENTRY
from qlora_cli.files.safetensors_io import (
    ALIGNMENT,
    TensorEntry,
    TensorSpec,
    bytes_of,
    read_header,
    write_tensors,
)
from qlora_cli.units import GIB

SHARD_BYTES = GIB
"""Largest size of a shard, unless one tensor is larger."""
_FILE_BYTES, _TENSOR_BYTES = 4096, 160
"""Bounds of what the files contain besides values and names: of each entry, and of each tensor."""
_SHARD_NAME = "packed-{:05}.safetensors"


class DamagedCopy(Exception):
    """A packed base is not as it was written. The text is the reason."""


@dataclass(frozen=True)
class PackedFiles:
    """A packed base that was opened. entries: name -> place of a tensor. checksums: CRC-32."""

    entries: Mapping[str, TensorEntry]
    checksums: Mapping[str, int]
    maps: Mapping[Path, mmap.mmap]

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def read(self, name: str, spec: TensorSpec) -> Tensor:
        """Return a tensor, mapped from its file. Raises DamagedCopy if a byte has changed."""
        entry = self.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise DamagedCopy(f"it has no {name} of this form")
        if not entry.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        flat = torch.frombuffer(
            self.maps[entry.file],
            dtype=spec.dtype,
            count=entry.num_bytes // spec.dtype.itemsize,
            offset=entry.start,
        )
        if zlib.crc32(bytes_of(flat)) != self.checksums.get(name):
            raise DamagedCopy(f"the checksum of {name} differs")
        # Products may round differently on tensors that do not begin where tensors usually do.
        is_aligned = flat.data_ptr() % ALIGNMENT == 0
        return (flat if is_aligned else flat.clone()).view(spec.shape)


def open_packed(folder: Path) -> PackedFiles:
    """Open the packed base in a folder. Raises DamagedCopy if it is incomplete."""
    try:
        content = json.loads((folder / ENTRY).read_text())
        checksums = {str(name): int(value) for name, value in content["checksums"].items()}
        entries: dict[str, TensorEntry] = {}
        maps: dict[Path, mmap.mmap] = {}
        for number in range(int(content["shards"])):
            file = folder / _SHARD_NAME.format(number)
            entries_of_file, _ = read_header(file)
            entries.update(entries_of_file)
            with file.open("rb") as stream:
                maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as fault:
        raise DamagedCopy(fault.strerror or str(fault)) from fault
    except ModelError as fault:
        raise DamagedCopy(fault.what) from fault
    except PARSE_ERRORS as fault:
        raise DamagedCopy(f"{ENTRY} is damaged: {fault!r}") from fault
    return PackedFiles(entries, checksums, maps)


def files_bytes(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Return an upper bound of the size of the files that `write_packed` writes."""
    return _FILE_BYTES + sum(t.nbytes + 2 * len(name) + _TENSOR_BYTES for name, t in tensors)


def write_packed(folder: Path, description: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write the files of a packed base into an existing, empty folder.

    tensors: their names and values, on any device. At any moment host memory contains one tensor of
    another device. Raises OSError if the disk is full.
    """
    checksums: dict[str, int] = {}
    number = 0
    for number, shard in enumerate(_shards(tensors), 1):
        _write_shard(folder / _SHARD_NAME.format(number - 1), shard, checksums)
    content = {"description": description, "shards": number, "checksums": checksums}
    with (folder / ENTRY).open("w") as stream:
        stream.write(json.dumps(content))


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each shard."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in (*shard.values(), tensor)) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def _write_shard(file: Path, shard: Mapping[str, Tensor], checksums: dict[str, int]) -> None:
    """Write one shard and add the checksums of its tensors to `checksums`."""

    def compute(name: str) -> Tensor:
        tensor = shard[name].cpu().contiguous()
        checksums[name] = zlib.crc32(bytes_of(tensor))
        return tensor

    specs = {
        name: TensorSpec(shard[name].dtype, tuple(shard[name].shape)) for name in _order(shard)
    }
    write_tensors(file, specs, compute, {})


def _order(shard: Mapping[str, Tensor]) -> Sequence[str]:
    """Return the names in an order in which most tensors are aligned."""
    return sorted(shard, key=lambda name: shard[name].nbytes % ALIGNMENT != 0)
