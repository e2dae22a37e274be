"""The codebook of quantized scales, one tensor per device.

It is here and not in bitsandbytes, whose cache a dry run would fill with meta tensors.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qlora_cli.memory.scopes import scope

# On CPUs with AVX512-BF16 importing bitsandbytes warns that an optional package is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb_functional  # noqa: E402

_codebooks: dict[torch.device, Tensor] = {}


def clear_scale_codebook(device: torch.device) -> None:
    """Remove the codebook of `device`, so that its memory is counted again, as in a new process."""
    _codebooks.pop(device, None)


def scale_codebook(device: torch.device) -> Tensor:
    """Return the 256 values of the 8-bit codes of quantized scales."""
    if device not in _codebooks:
        with scope("quant_constants"):
            _codebooks[device] = bnb_functional.create_dynamic_map().to(device)
    return _codebooks[device]
