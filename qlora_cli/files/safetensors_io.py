"""safetensors files, one tensor at a time, in both directions.

Why not the library's own reader: it maps whole files, and every page touched stays in the process's
resident set, so that a job's host memory grows with the model. Here a tensor is read into a buffer
of its own size and nothing else is held. Its writer wants all tensors at once; merging has one at a
time. The format is eight bytes of header length, a JSON header and raw bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora_cli.errors import ModelError

_LENGTH_BYTES = 8
_CHUNK = 2**18
_LARGEST_HEADER = 100 * 1024**2
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
    """One tensor in a file. start: first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Of the tensor's values."""
        num = self.dtype.itemsize
        for size in self.shape:
            num *= size
        return num


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """(every tensor's entry, the file's metadata). Raises ModelError on a damaged file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, file.stat().st_size - _LENGTH_BYTES):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            start = _LENGTH_BYTES + length
            entries = {name: _entry(file, start, about) for name, about in header.items()}
        ends = [entry.start + entry.num_bytes for entry in entries.values()]
        if max(ends, default=start) != file.stat().st_size:
            raise ValueError(
                f"it ends at byte {file.stat().st_size}, not {max(ends, default=start)}"
            )
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror or fault}", where=str(file)) from fault
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ModelError(
            f"damaged safetensors file: {fault}", where=str(file), hint="fetch the file again"
        ) from fault
    return entries, metadata


def _entry(file: Path, start: int, about: Mapping[str, Any]) -> TensorEntry:
    first, end = about["data_offsets"]
    shape = tuple(int(size) for size in about["shape"])
    entry = TensorEntry(file, _DTYPES[str(about["dtype"])], shape, start + int(first))
    if entry.num_bytes != int(end) - int(first):
        raise ValueError(f"a tensor of shape {shape} lies in {int(end) - int(first)} bytes")
    return entry


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor on the host, in memory of its own size. Raises ModelError on a short file."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if not entry.num_bytes:
        return tensor
    buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        filled = 0
        while filled < entry.num_bytes:
            count = stream.readinto(buffer[filled:])
            if not count:
                raise ModelError("the file is shorter than its header says", where=str(entry.file))
            filled += count
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of `tensor` is NaN or infinite; integers never are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes of a part are NaN where one of its values is, and ten times faster than isfinite.
    extremes = (part.aminmax() for part in tensor.reshape(-1).split(_CHUNK))
    return all(bool(least.isfinite() & most.isfinite()) for least, most in extremes)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor to be written will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the tensor's values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(
    file: Path,
    shapes: Mapping[str, TensorSpec],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes `make(name)` for each name in turn, holding one tensor at a time.

    The file is written in place: the caller passes one that takes its name when it is whole, or
    one in such a folder. Raises OSError as the disk does.
    """
    with file.open("wb") as stream:
        stream.write(_header(shapes, metadata))
        for name, shape in shapes.items():
            _write_one(stream, name, shape, make(name))


def _header(shapes: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, shape in shapes.items():
        end = position + shape.num_bytes
        header[name] = {
            "dtype": _NAMES[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Aligned, so that readers that map the file get aligned tensors.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _write_one(stream: BinaryIO, name: str, shape: TensorSpec, tensor: Tensor) -> None:
    assert (tensor.dtype, tuple(tensor.shape)) == (shape.dtype, shape.shape), name
    flat = tensor.contiguous().reshape(-1)
    if flat.numel():
        stream.write(flat.view(torch.uint8).numpy().data)
