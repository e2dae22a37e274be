"""The error for a model that cannot be written as a GGUF file."""

from __future__ import annotations

from qlora_cli.errors import UsageError


def unsupported(reason: str) -> UsageError:
    """Return the error for a model that cannot be written as a GGUF file. reason: one clause."""
    return UsageError(
        reason,
        where="--gguf",
        hint="leave --gguf out; llama.cpp's convert_hf_to_gguf.py may support this model",
    )
