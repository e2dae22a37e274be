"""The choices of `qlora merge`: the base, the output dtype and the type of a GGUF file.

This module imports no torch, so the command line can list the choices at once. To add an output
dtype, add one entry to `OUTPUT_DTYPES`: the option `--dtype`, the range check of a merge and the
range check of `qlora verify` all read this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

MergeBase = Literal["original", "dequantized"]
"""The weights that the adapter is added to; `merged_tensors.py` defines both."""
MERGE_BASES: tuple[MergeBase, ...] = get_args(MergeBase)
AUTO_BASE = "auto"
"""Choose the base by comparing both merged models with the trained one (`base_choice.py`)."""


@dataclass(frozen=True)
class OutputDtype:
    """One dtype that a merged checkpoint can be written in.

    name: the dtype's name in torch and in config.json.
    narrow_range: True if weights or activations of a model can overflow or underflow in this dtype.
        Merging and verification then check its range (`dtype_range.py`).
    """

    name: str
    narrow_range: bool = False


OUTPUT_DTYPES: Mapping[str, OutputDtype] = {
    dtype.name: dtype
    for dtype in (
        OutputDtype("float16", narrow_range=True),
        OutputDtype("bfloat16"),
        OutputDtype("float32"),
    )
}
"""Name -> dtype, for every dtype that `--dtype` offers."""
DEFAULT_DTYPE = "float16"
"""Written unless the user names a dtype: every program reads it, and it rounds eight times finer
than bfloat16."""
FALLBACK_DTYPE = "bfloat16"
"""Written instead if the model does not fit the range of `DEFAULT_DTYPE`. It has the range of
float32."""

GgufEncoding = Literal["f16", "q8_0"]
"""Encodings that this package writes; `gguf/plan.py` maps them to llama.cpp's types."""
QuantizedGguf = Literal["q4_k_m", "q5_k_m", "q6_k"]
"""Types that llama.cpp's quantizer makes of a float16 file (`gguf/quantizer.py`)."""
GgufType = GgufEncoding | QuantizedGguf
GGUF_ENCODINGS: tuple[GgufEncoding, ...] = get_args(GgufEncoding)
QUANTIZED_GGUFS: tuple[QuantizedGguf, ...] = get_args(QuantizedGguf)
GGUF_TYPES: tuple[GgufType, ...] = (*GGUF_ENCODINGS, *QUANTIZED_GGUFS)
"""What `--gguf` offers, from the largest file to types with smaller ones."""


def has_narrow_range(dtype_name: str) -> bool:
    """Return whether a model may not fit the range of this dtype, so that it must be checked.

    dtype_name: any dtype's name; one that merging does not write has no entry and returns False.
    """
    dtype = OUTPUT_DTYPES.get(dtype_name)
    return dtype is not None and dtype.narrow_range
