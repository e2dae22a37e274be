"""Read a GGUF file back and compare it with the merged folder, value by value.

- Metadata: every key has the value that the folder gives.
- float32 and float16 tensors: bit for bit the source's values, rounded to that dtype.
- Q8_0 tensors: bit for bit the `gguf` package's own quantization. In addition every unpacked value
  is within half a step of the source's, plus what rounding the block's step d to float16 moves it:
  |x - q d16| <= d / 2 + |q| |d - d16|.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, Keys, ReaderTensor

from qlora_cli.errors import VerificationFailed
from qlora_cli.events import Observer
from qlora_cli.export.gguf.encode import Array, encoded_rows
from qlora_cli.export.gguf.file_tensors import tensor_faults
from qlora_cli.export.gguf.model import PlannedTensor
from qlora_cli.export.gguf.plan import GgufPlan
from qlora_cli.export.gguf.quantized import quantized_faults
from qlora_cli.export.verify.faults import shorten_faults

_BLOCK_VALUES = 32
_BLOCK_BYTES = 34
"""A Q8_0 block: a float16 step and 32 int8 numbers."""


def verify_gguf(
    file: Path, plan: GgufPlan, observer: Observer, *, is_quantized: bool = False
) -> None:
    """Check that a GGUF file is the one that was planned.

    is_quantized: whether llama.cpp's quantizer made the file of the planned one. Its tensors must
    then be within the error of their types, and only the type of the file may be other metadata.

    Raises VerificationFailed that names the metadata and tensors that differ.
    """
    if is_quantized:
        metadata = partial(_metadata_faults, plan, ignored=(Keys.General.FILE_TYPE,))
        faults = list(quantized_faults(file, plan, observer, metadata))
    else:
        faults = list(gguf_faults(file, plan, observer))
    if faults:
        raise VerificationFailed(
            "the GGUF file differs from the merged model: " + "; ".join(shorten_faults(faults)),
            where=str(file),
            hint="check the disk and merge again; the folder's safetensors files are unchanged",
        )


def gguf_faults(file: Path, plan: GgufPlan, observer: Observer) -> Iterator[str]:
    """Return an iterator over one line for each difference between a GGUF file and the plan."""
    return tensor_faults(file, plan, observer, _value_faults, partial(_metadata_faults, plan))


def _metadata_faults(
    plan: GgufPlan, reader: GGUFReader, ignored: Sequence[str] = ()
) -> Iterator[str]:
    (entries,) = plan.writer().kv_data
    for key, entry in entries.items():
        if key in ignored:
            continue
        field = reader.get_field(key)
        expected = entry.value
        if entry.type == GGUFValueType.FLOAT32:
            expected = float(np.float32(expected))
        if field is None or field.contents() != expected:
            yield f"{key} is not what the folder gives"


def _value_faults(planned: PlannedTensor, tensor: ReaderTensor) -> Iterator[str]:
    if tensor.tensor_type != planned.encoding:
        yield f"{planned.name} is {tensor.tensor_type.name}; it must be {planned.encoding.name}"
        return
    num_rows = num_differing = 0
    for values, expected in encoded_rows(planned):
        rows = tensor.data[num_rows : num_rows + len(expected)]
        num_rows += len(expected)
        num_differing += int((rows.view(np.uint8) != expected.view(np.uint8)).sum())
        if planned.encoding == GGMLQuantizationType.Q8_0:
            num_differing += _num_beyond_rounding(values.float().numpy(), rows)
    if num_differing:
        yield (
            f"{planned.name} differs from the merged folder's in {num_differing:,} bytes or values"
        )


def _num_beyond_rounding(values: Array, data: Array) -> int:
    """Return how many values of a Q8_0 tensor differ from the source by more than rounding."""
    blocks = data.reshape(-1, _BLOCK_BYTES)
    stored_step = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    numbers = blocks[:, 2:].view(np.int8).astype(np.float32)
    source = values.reshape(-1, _BLOCK_VALUES)
    step = np.abs(source).max(axis=1, keepdims=True) / np.float32(127)
    # A product of 7 and 11 bits is exact; the nearest number is exact up to float32's rounding.
    allowed = step * np.float32(0.5 + 2.0**-16) + np.abs(numbers) * np.abs(step - stored_step)
    return int((np.abs(source - numbers * stored_step) > allowed).sum())
