"""Compare a GGUF file in any encoding with the merged folder, by the error of each tensor.

llama.cpp's quantizer gives different encodings to different tensors of a file, and no exact result
is defined for the values. So each tensor is unpacked by the `gguf` package, and the root mean
square of its error, relative to the merged tensor, must not exceed a limit per encoding. A tensor
of zeros has the error 1, and other weights have an error of about 1.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

from qlora_cli.events import Observer
from qlora_cli.export.gguf.encode import Array
from qlora_cli.export.gguf.file_tensors import (
    MetadataFaults,
    no_metadata_faults,
    tensor_faults,
)
from qlora_cli.export.gguf.model import PlannedTensor
from qlora_cli.export.gguf.plan import GgufPlan

_MAX_ERROR = {
    GGMLQuantizationType.F32: 1e-3,
    GGMLQuantizationType.F16: 1e-3,
    GGMLQuantizationType.BF16: 1e-2,
    GGMLQuantizationType.Q8_0: 0.02,
    GGMLQuantizationType.Q6_K: 0.06,
    GGMLQuantizationType.Q5_0: 0.12,
    GGMLQuantizationType.Q5_1: 0.1,
    GGMLQuantizationType.Q5_K: 0.1,
    GGMLQuantizationType.Q4_K: 0.2,
}
"""Encoding -> largest relative error of a tensor; two to three times that of Gaussian weights."""
_OTHER_MAX_ERROR = 0.5
_ROWS = 256
"""Rows of a tensor that are unpacked at a time."""


def quantized_faults(
    file: Path,
    plan: GgufPlan,
    observer: Observer,
    metadata_faults: MetadataFaults = no_metadata_faults,
) -> Iterator[str]:
    """Return an iterator over one line for each tensor of a GGUF file that is not the merged one.

    plan: the plan of the same folder in any encoding; only names, shapes and sources are used.
    metadata_faults: yields the lines for the file's metadata.
    """
    return tensor_faults(file, plan, observer, _value_faults, metadata_faults)


def _value_faults(planned: PlannedTensor, tensor: ReaderTensor) -> Iterator[str]:
    error = _relative_error(planned, tensor.data, tensor.tensor_type)
    # `not <=` also reports NaN.
    if not error <= _MAX_ERROR.get(tensor.tensor_type, _OTHER_MAX_ERROR):
        yield (
            f"{planned.name} differs from the merged tensor by {error:.1%}, which is more than "
            f"{tensor.tensor_type.name} does"
        )


def _relative_error(planned: PlannedTensor, data: Array, kind: GGMLQuantizationType) -> float:
    source = planned.read()
    squared_error = squared = 0.0
    num_rows = 0
    for rows in planned.rows(_ROWS):
        values = source[rows].double().numpy()
        stored = data[num_rows : num_rows + len(values)]
        num_rows += len(values)
        unpacked = dequantize(stored, kind).reshape(values.shape)
        squared_error += float(np.square(unpacked - values).sum())
        squared += float(np.square(values).sum())
    return float(np.sqrt(squared_error / squared)) if squared else squared_error
