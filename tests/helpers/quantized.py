"""Random tensors and packed linears."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear


def packed(
    weight: Tensor, bits: int = 4, compute: torch.dtype = torch.float32, **more: object
) -> QuantLinear:
    """Return a linear with `weight` (out, in) quantized to `bits` bits.

    compute: dtype of the matmul. more: further arguments of WeightFormat.
    """
    weight_format = WeightFormat(bits, compute, torch.float16, **more)  # type: ignore[arg-type]
    layer = QuantLinear(weight.shape[1], weight.shape[0], bias=False, weight_format=weight_format)
    layer.pack(weight)
    return layer


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normally distributed values of a shape, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
