"""Weights of experts in MXFP4, the form in which gpt-oss is distributed, read as bfloat16.

A stack X (E, in, out) is stored as X_blocks (E, out, in / 32, 16) and X_scales (E, out, in / 32),
both uint8. A block has 32 numbers of 4 bits (FP4: a sign, two bits of exponent, one of mantissa),
the lower half of each byte first, and one scale 2^(s - 127). Every such product is a bfloat16
number, so reading loses nothing.

Source: OCP Microscaling Formats specification 1.0; transformers 5.23, `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.packed_entry import PackedEntry
from qlora_cli.files.safetensors_io import TensorEntry, read_tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_OFFSET = 127


@dataclass(frozen=True)
class Mxfp4Entry(PackedEntry):
    """A stack that two tensors of a file contain; dtype and shape are those of the stack read."""

    blocks: TensorEntry
    scales: TensorEntry

    def read(self) -> Tensor:
        """Return the stack (E, in, out) in bfloat16, on the CPU, decoded expert by expert."""
        blocks, scales = read_tensor(self.blocks), read_tensor(self.scales)
        stack = torch.empty(self.shape, dtype=self.dtype)
        for expert in range(self.shape[0]):
            stack[expert] = _decoded(blocks[expert], scales[expert]).t()
        return stack


def with_stacks(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the entries of a checkpoint with each pair of blocks and scales as one stack.

    Raises ModelError for blocks without their scales.
    """
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        stem = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in entries:
            continue
        is_packed = name.endswith(_BLOCKS) and entry.dtype == torch.uint8
        found[stem if is_packed else name] = _entry(stem, entries) if is_packed else entry
    return found


def _entry(stem: str, entries: Mapping[str, TensorEntry]) -> Mxfp4Entry:
    blocks, scales = entries[stem + _BLOCKS], entries.get(stem + _SCALES)
    if scales is None or len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape:
        form = "missing" if scales is None else str(scales.shape)
        raise ModelError(
            f"{stem}{_BLOCKS} {blocks.shape} needs {stem}{_SCALES} of shape {blocks.shape[:-1]}, "
            f"which is {form}",
            where=str(blocks.file),
            hint="the base is damaged; download it again",
        )
    experts, rows, groups, num_bytes = blocks.shape
    shape = (experts, groups * num_bytes * 2, rows)
    return Mxfp4Entry(blocks.file, torch.bfloat16, shape, blocks.start, blocks, scales)


def _decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return a matrix (out, in). blocks: (out, groups, bytes). scales: (out, groups)."""
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.bfloat16)
    codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(2)
    exponents = scales.int() - _EXPONENT_OFFSET
    return torch.ldexp(values[codes.int()], exponents[..., None]).to(torch.bfloat16).flatten(1)
