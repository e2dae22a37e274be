"""The files of a packed base: safetensors shards, and the checksum of each tensor in `entry.json`.

A tensor is mapped from its shard and not read into memory of the process: the system loads a page
when it is used and can drop it again. The mapping is private, so that writing to a tensor changes
no file. A shard is mapped as long as one of its tensors is used. `disk_tensor` maps nothing.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import PARSE_ERRORS
from qlora_cli.files.cache import ENTRY
from qlora_cli.files.disk_tensor import DiskTensor, OpenFile
from qlora_cli.files.safetensors_io import (
    ALIGNMENT,
    TensorEntry,
    TensorSpec,
    bytes_of,
    read_header,
    write_arriving,
)
from qlora_cli.units import GIB, MIB

SHARD_BYTES = GIB // 2
"""Largest size of a shard, unless one tensor is larger."""
_CHECKED_BYTES = 8 * MIB
"""Bytes of a tensor that are read at once to compute its checksum."""
_FILE_BYTES, _TENSOR_BYTES = 4096, 160
"""Bounds of what the files contain besides values and names: of each entry, and of each tensor."""
_SHARD_NAME = "packed-{:05}.safetensors"


class DamagedCopy(Exception):
    """A packed base is not as it was written. The text is the reason."""


@dataclass(frozen=True)
class PackedFiles:
    """A packed base that was opened.

    entries: name -> place of a tensor. checksums: name -> CRC-32 of its bytes. files: path -> open
    shard, which can be read even after the copy was removed. maps: path ->
    mapped shard.
    """

    entries: Mapping[str, TensorEntry]
    checksums: Mapping[str, int]
    files: Mapping[Path, OpenFile]
    maps: WeakValueDictionary[Path, mmap.mmap] = field(default_factory=WeakValueDictionary)

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def read(self, name: str, spec: TensorSpec) -> Tensor:
        """Return a tensor, mapped from its file. Raises DamagedCopy if a byte has changed."""
        entry = self._entry(name, spec)
        if not entry.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        flat = torch.frombuffer(
            self._map(entry.file),
            dtype=spec.dtype,
            count=entry.num_bytes // spec.dtype.itemsize,
            offset=entry.start,
        )
        if zlib.crc32(bytes_of(flat)) != self.checksums.get(name):
            raise DamagedCopy(f"the checksum of {name} differs")
        # Products may round differently on tensors that do not begin where tensors usually do.
        is_aligned = flat.data_ptr() % ALIGNMENT == 0
        return (flat if is_aligned else flat.clone()).view(spec.shape)

    def disk_tensor(self, name: str, spec: TensorSpec) -> DiskTensor:
        """Return a tensor that stays in its file. Raises DamagedCopy if a byte has changed."""
        entry = self._entry(name, spec)
        found, checksum = DiskTensor(entry, self.files[entry.file]), 0
        buffer = memoryview(self._buffer)
        for start in range(0, entry.num_bytes, _CHECKED_BYTES):
            part = buffer[: entry.num_bytes - start]
            try:
                found.read_bytes(part, start)
            except (OSError, ModelError) as fault:
                raise DamagedCopy(f"{name} cannot be read: {fault}") from fault
            checksum = zlib.crc32(part, checksum)
        if checksum != self.checksums.get(name):
            raise DamagedCopy(f"the checksum of {name} differs")
        return found

    @cached_property
    def _buffer(self) -> mmap.mmap:
        """Return the memory to compute checksums in.

        It is outside of the heap, which buffers of this size break up.
        """
        return mmap.mmap(-1, _CHECKED_BYTES)

    def _entry(self, name: str, spec: TensorSpec) -> TensorEntry:
        entry = self.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise DamagedCopy(f"it has no {name} of this form")
        return entry

    def _map(self, file: Path) -> mmap.mmap:
        mapped = self.maps.get(file)
        if mapped is None:
            mapped = mmap.mmap(self.files[file].descriptor, 0, access=mmap.ACCESS_COPY)
            self.maps[file] = mapped
        return mapped


def open_packed(folder: Path) -> PackedFiles:
    """Open the packed base in a folder. Raises DamagedCopy if it is incomplete."""
    try:
        content = json.loads((folder / ENTRY).read_text())
        checksums = {str(name): int(value) for name, value in content["checksums"].items()}
        entries: dict[str, TensorEntry] = {}
        files: dict[Path, OpenFile] = {}
        for number in range(int(content["shards"])):
            file = folder / _SHARD_NAME.format(number)
            entries_of_file, _ = read_header(file)
            entries.update(entries_of_file)
            files[file] = OpenFile(file)
    except OSError as fault:
        raise DamagedCopy(fault.strerror or str(fault)) from fault
    except ModelError as fault:
        raise DamagedCopy(fault.what) from fault
    except PARSE_ERRORS as fault:
        raise DamagedCopy(f"{ENTRY} is damaged: {fault!r}") from fault
    return PackedFiles(entries, checksums, files)


def files_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Return an upper bound of the size of the files that `write_packed` writes."""
    tensors = (spec.num_bytes + 2 * len(name) + _TENSOR_BYTES for name, spec in specs.items())
    return _FILE_BYTES + sum(tensors)


def specs_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, TensorSpec]:
    """Return name -> dtype and shape of tensors, in their order."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


def write_packed(
    folder: Path,
    description: str,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write the files of a packed base into an existing, empty folder.

    specs: name -> dtype and shape of the tensors, in the order of `tensors`. tensors: names and
    values, on any device; host memory contains one at a time. Raises OSError if the disk is full.
    """
    checksums: dict[str, int] = {}
    arriving = _with_checksums(tensors, checksums)
    number = 0
    for number, shard in enumerate(_shards(specs), 1):
        file = folder / _SHARD_NAME.format(number - 1)
        write_arriving(file, _ordered(shard), islice(arriving, len(shard)))
    content = {"description": description, "shards": number, "checksums": checksums}
    with (folder / ENTRY).open("w") as stream:
        stream.write(json.dumps(content))


def _with_checksums(
    tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on the CPU, and add the checksum of each to `checksums`."""
    for name, tensor in tensors:
        held = [tensor.cpu().contiguous()]
        del tensor
        checksums[name] = zlib.crc32(bytes_of(held[0]))
        yield name, held.pop()


def _shards(specs: Mapping[str, TensorSpec]) -> Iterator[dict[str, TensorSpec]]:
    """Yield the tensors of each shard."""
    shard: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if shard and sum(s.num_bytes for s in (*shard.values(), spec)) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = spec
    if shard:
        yield shard


def _ordered(shard: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors in an order in which most of them are aligned."""
    names = sorted(shard, key=lambda name: shard[name].num_bytes % ALIGNMENT != 0)
    return {name: shard[name] for name in names}
