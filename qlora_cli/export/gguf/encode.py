"""Encode a tensor's values as a GGUF file stores them, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from qlora_cli.errors import QloraError
from qlora_cli.export.gguf.model import PlannedTensor

Array = np.ndarray[Any, Any]

_FLOAT_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
}
"""Encodings that store floating-point numbers -> torch's dtype."""
_CHUNK_ELEMENTS = 2**18
"""Elements in float32 at a time: 1 MiB, which fits into a processor's cache."""


def encoded(planned: PlannedTensor) -> Array:
    """Return the bytes of the tensor as the file stores them, uint8.

    Raises QloraError if a value is too large for the encoding.
    """
    content = np.empty(planned.num_bytes, np.uint8)
    done = 0
    for _, chunk in encoded_rows(planned):
        content[done : done + chunk.nbytes] = chunk.reshape(-1).view(np.uint8)
        done += chunk.nbytes
    return content


def encoded_rows(planned: PlannedTensor) -> Iterator[tuple[Tensor, Array]]:
    """Yield (the source's values, the same values encoded), some rows at a time.

    Rows come in the order of the file. Raises QloraError if a value is too large for the encoding.
    """
    tensor = planned.read()
    width = torch.Size(planned.shape[1:]).numel()
    for rows in planned.rows(max(1, _CHUNK_ELEMENTS // width)):
        values = tensor[rows]
        yield values, _encode(values, planned)


def _encode(values: Tensor, planned: PlannedTensor) -> Array:
    dtype = _FLOAT_DTYPES.get(planned.encoding)
    # The step of a Q8_0 block is a float16, and the block's largest value is 127 steps.
    limit = torch.finfo(dtype).max if dtype else 127 * torch.finfo(torch.float16).max
    smallest, largest = values.aminmax()
    # `not <=` also refuses NaN.
    if not max(-smallest, largest) <= limit:
        raise QloraError(
            f"{planned.name} has values that {planned.encoding.name} cannot represent",
            where="--gguf",
            hint="leave --gguf out and convert the merged folder with llama.cpp's "
            "convert_hf_to_gguf.py --outtype bf16",
        )
    if dtype:
        return values.to(dtype).numpy()
    return quantize(values.float().numpy(), planned.encoding)
