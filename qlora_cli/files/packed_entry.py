"""A weight that a checkpoint stores in a quantized form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_cli.files.safetensors_io import TensorEntry

WEIGHT = ""
SCALE, SCALE_OF_SCALE, OFFSET = CONSTANTS = ("scale", "scale_of_scale", "offset_of_scale")
"""Names of the tensors of a packed linear: its codes, and its quantization constants."""


@dataclass(frozen=True)
class StoredFormat:
    """The form of a quantized weight.

    bits: 4 or 8. The rest is of 4 bit. quant_type: nf4 or fp4. block_size: number of weights that
    share a scale. scale_block_size: number of scales that share one of their own, 0 if scales are
    not quantized. has_usual_scales: quantized scales have the codebook that bitsandbytes creates.
    """

    bits: int
    quant_type: str = ""
    block_size: int = 0
    scale_block_size: int = 0
    has_usual_scales: bool = True


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """The tensors of one weight in a file; dtype and shape are those of the weight that is read."""

    def read(self) -> Tensor:
        """Return the weight in 16 bit, on the CPU."""
        raise NotImplementedError

    def stored_format(self) -> StoredFormat | None:
        """Return the form of the stored weight; None if no packed linear has this form."""
        return None

    def stored(self) -> dict[str, Tensor]:
        """Return the weight as it is stored: name of a tensor of a packed linear -> tensor."""
        raise NotImplementedError
