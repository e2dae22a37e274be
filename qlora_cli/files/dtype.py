"""Conversion between dtypes and their names, and the dtype of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype with this name: `bfloat16` -> torch.bfloat16."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: torch.bfloat16 -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def file_dtype(config: Any) -> torch.dtype:
    """Return the dtype of a checkpoint's weights according to its config, or float32 without one.

    config: a transformers config object, not modified since it was read.
    """
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
