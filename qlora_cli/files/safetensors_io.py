"""Reads and writes safetensors files one tensor at a time.

Why not the safetensors library: its reader maps the complete file into memory, and every page that
was read counts as resident memory of the process, so that CPU memory grows with the model. This
module reads a tensor into a buffer of its own size and keeps nothing else. The library's writer
needs all tensors at once; a merge computes them one at a time.

File format: the length of the header (8 bytes, little endian), a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import PARSE_ERRORS

_LENGTH_BYTES = 8
ALIGNMENT = 64
"""The first tensor of a written file begins at a multiple of this number of bytes, as tensors in
memory do."""
_CHUNK_ELEMENTS = 2**18
_MAX_HEADER_BYTES = 100 * 1024**2
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """The location and form of one tensor in a file.

    start: position of the tensor's first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensor's values in bytes."""
        num = self.dtype.itemsize
        for size in self.shape:
            num *= size
        return num


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return (name -> entry of each tensor, metadata) of a file.

    Raises ModelError if the file cannot be read, is damaged or has another size than its header
    says.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, file.stat().st_size - _LENGTH_BYTES):
                raise ValueError(f"impossible header length of {length} bytes")
            header = json.loads(
                stream.read(length),
                parse_constant=_no_number,
                parse_int=lambda text: int(_in_range(text)),
                parse_float=lambda text: float(_in_range(text)),
            )
            json.dumps(header, ensure_ascii=False).encode()  # Raises at half characters.
            metadata = _metadata(header.pop("__metadata__", None))
            start = _LENGTH_BYTES + length
            entries = {name: _entry(file, start, fields) for name, fields in header.items()}
        end = _check_places(entries, start)
        if end != file.stat().st_size:
            raise ValueError(f"it has {file.stat().st_size} bytes; its header describes {end}")
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror or fault}", where=str(file)) from fault
    except PARSE_ERRORS as fault:
        raise ModelError(
            f"damaged safetensors file: {str(fault)[:200]}",
            where=str(file),
            hint="fetch the file again",
        ) from fault
    return entries, metadata


def _check_places(entries: Mapping[str, TensorEntry], start: int) -> int:
    """Check that the tensors follow one another, as the format requires, and return their end.

    start: position of the first tensor's first byte. Raises ValueError.
    """
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != end:
            raise ValueError(f"the tensor {name} begins at byte {entry.start} instead of {end}")
        end += entry.num_bytes
    return end


def _no_number(name: str) -> None:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def _in_range(text: str) -> str:
    """Return the text of a number. Raises ValueError if float64 cannot represent it."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]}... is out of range")
    return text


def _metadata(content: Any) -> dict[str, str]:
    """Return the header's metadata, which must be texts. Raises ValueError."""
    metadata = {} if content is None else content
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not a map of texts")
    return metadata


def _entry(file: Path, start: int, fields: Mapping[str, Any]) -> TensorEntry:
    """Return the entry of one tensor from its fields in the header. Raises ValueError, KeyError."""
    first, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
        raise ValueError(f"the shape {shape} or the offsets {first} and {end} are not sizes")
    if fields["dtype"] not in _DTYPES:
        raise ValueError(f"the dtype {str(fields['dtype'])[:40]!r} is not supported")
    entry = TensorEntry(file, _DTYPES[fields["dtype"]], shape, start + first)
    if entry.num_bytes != end - first:
        raise ValueError(f"a tensor of shape {shape} has {end - first} bytes")
    return entry


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read a tensor into CPU memory of its own size. Raises ModelError if the file is too short."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if not entry.num_bytes:
        return tensor
    buffer = bytes_of(tensor)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        filled = 0
        while filled < entry.num_bytes:
            count = stream.readinto(buffer[filled:])
            if not count:
                raise ModelError("the file is shorter than its header says", where=str(entry.file))
            filled += count
    return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of `tensor` is NaN or infinite. Always true for integers."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Minimum and maximum are NaN if any value is NaN, and ten times faster than isfinite().
    extremes = (chunk.aminmax() for chunk in tensor.reshape(-1).split(_CHUNK_ELEMENTS))
    return all(bool(low.isfinite() & high.isfinite()) for low, high in extremes)


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensor's values in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(
    file: Path,
    specs: Mapping[str, TensorSpec],
    compute: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, with one tensor in memory at a time.

    file: is written in place; pass the path from `atomic_file`, or a file in such a folder.
    specs: name -> dtype and shape of each tensor, in the order in which they are written.
    compute: returns the tensor with this name, on the CPU; called once per name, in order.
    metadata: text stored in the header.

    Raises OSError if the disk is full.
    """
    with file.open("wb") as stream:
        stream.write(_header(specs, metadata))
        for name, spec in specs.items():
            _write_tensor(stream, name, spec, compute(name))


def write_arriving(
    file: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file whose tensors arrive in any order, each once.

    file: as of `write_tensors`. specs: name -> dtype and shape, in the order of the file. tensors:
    names and values, on the CPU. Raises OSError if the disk is full.
    """
    with file.open("wb") as stream:
        header = _header(specs, {})
        stream.write(header)
        starts, position = {}, len(header)
        for name, spec in specs.items():
            starts[name], position = position, position + spec.num_bytes
        for name, tensor in tensors:
            stream.seek(starts.pop(name))
            _write_tensor(stream, name, specs[name], tensor)
            del tensor  # Before the next one is computed.
        assert not starts, f"{len(starts)} tensors have not arrived"


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, spec in specs.items():
        end = position + spec.num_bytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded, so that readers that map the file get aligned tensors.
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _write_tensor(stream: BinaryIO, name: str, spec: TensorSpec, tensor: Tensor) -> None:
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name
    if tensor.numel():
        stream.write(bytes_of(tensor.contiguous()))
