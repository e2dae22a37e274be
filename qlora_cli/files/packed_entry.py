"""A weight that a checkpoint stores in a quantized form and that is read in 16 bit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_cli.files.safetensors_io import TensorEntry


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """The tensors of one weight in a file; dtype and shape are those of the weight that is read."""

    def read(self) -> Tensor:
        """Return the weight, on the CPU."""
        raise NotImplementedError
