"""Quantize a float16 GGUF file with llama.cpp's own quantizer.

The quantizer chooses a type for each tensor. For example Q4_K_M has some tensors in Q6_K, and a
tensor whose rows are no multiple of 256 gets a type with blocks of 32.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from qlora_cli.errors import QloraError
from qlora_cli.export.gguf.llama_library import llama_cpp
from qlora_cli.export.options import QuantizedGguf

_FILE_TYPES: dict[QuantizedGguf, str] = {
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
}
"""Type of the command line -> name of llama.cpp's constant."""


def quantize_file(source: Path, kind: QuantizedGguf, out: Path) -> None:
    """Write the quantized file `out` from a float16 file. Raises QloraError if llama.cpp fails."""
    library = llama_cpp()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, _FILE_TYPES[kind])
    status = library.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(settings)
    )
    if status != 0:
        raise QloraError(
            f"llama.cpp could not quantize the model to {kind}",
            where=str(source),
            hint="check the free space on the disk, or choose --gguf q8_0",
        )
