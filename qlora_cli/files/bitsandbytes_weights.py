"""Linear weights that bitsandbytes quantized and transformers saved, read as stored or in 16 bit.

In 4 bit (NF4, FP4) the tensor X.weight has the codes, X.weight.absmax their scales, which may be
quantized themselves (nested), and X.weight.quant_state.bitsandbytes__nf4 a JSON text with the
shape. In 8 bit (LLM.int8()) X.weight (out, in) is int8, and X.SCB has the largest value of each
row.

Source: bitsandbytes 0.50, `functional.QuantState.as_dict`, `nn.Linear8bitLt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.dtype import torch_dtype
from qlora_cli.files.packed_entry import (
    OFFSET,
    SCALE,
    SCALE_OF_SCALE,
    WEIGHT,
    PackedEntry,
    StoredFormat,
)
from qlora_cli.files.safetensors_io import TensorEntry, read_tensor

_STATE = ".quant_state.bitsandbytes__"
_WEIGHT, _SCALES, _FORMAT = ".weight", ".SCB", ".weight_format"
_LARGEST_CODE = 127


@dataclass(frozen=True)
class FourBitEntry(PackedEntry):
    """A 4-bit weight.

    codes: its entry. constants: name after `X.weight.` -> entry. settings: the JSON text.
    """

    codes: TensorEntry
    constants: Mapping[str, TensorEntry]
    settings: Mapping[str, Any]

    def read(self) -> Tensor:
        """Return the weight (out, in) that bitsandbytes computes with."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        constants = {name: read_tensor(entry) for name, entry in self.constants.items()}
        state = QuantState.from_dict(constants, device=torch.device("cpu"))
        # Flat, for the reason in `QuantLinear.dequantize`.
        shape, state.shape = state.shape, torch.Size([state.shape.numel()])
        weight: Tensor = dequantize_4bit(read_tensor(self.codes), state)
        return weight.view(shape)

    def stored_format(self) -> StoredFormat:
        """Return the form of the stored weight."""
        settings = self.settings
        return StoredFormat(
            4,
            str(settings.get("quant_type")),
            int(settings.get("blocksize", 0)),
            int(settings.get("nested_blocksize", 0)),
            self._has_usual_scales(),
        )

    def _has_usual_scales(self) -> bool:
        from bitsandbytes.functional import create_dynamic_map

        codebook = self.constants.get("nested_quant_map")
        return codebook is None or torch.equal(read_tensor(codebook), create_dynamic_map())

    def stored(self) -> dict[str, Tensor]:
        """Return codes and constants; they may have been saved as elements of a larger dtype."""
        codes = read_tensor(self.codes).view(-1).view(torch.uint8).view(-1, 1)
        tensors = {WEIGHT: codes, SCALE: read_tensor(self.constants["absmax"])}
        if "nested_absmax" in self.constants:
            tensors[SCALE_OF_SCALE] = read_tensor(self.constants["nested_absmax"])
            tensors[OFFSET] = torch.tensor(float(self.settings["nested_offset"]))
        return tensors


@dataclass(frozen=True)
class EightBitEntry(PackedEntry):
    """An 8-bit weight. codes: (out, in). scales: (out,)."""

    codes: TensorEntry
    scales: TensorEntry

    def read(self) -> Tensor:
        """Return the weight (out, in) that bitsandbytes computes with."""
        scales = read_tensor(self.scales) / _LARGEST_CODE
        return read_tensor(self.codes).float().mul_(scales[:, None]).to(self.dtype)

    def stored_format(self) -> StoredFormat:
        """Return the form of the stored weight."""
        return StoredFormat(8)

    def stored(self) -> dict[str, Tensor]:
        """Return the codes, and the factor of each row's codes."""
        scales = read_tensor(self.scales).float() / _LARGEST_CODE
        return {WEIGHT: read_tensor(self.codes), SCALE: scales}


def with_weights(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the entries of a checkpoint with each quantized weight as one tensor.

    Raises ModelError if the description of a weight is damaged.
    """
    found: dict[str, TensorEntry] = dict(entries)
    for name in entries:
        weight, is_four_bit, _ = name.partition(_STATE)
        stem = name.removesuffix(_SCALES)
        if is_four_bit and weight in entries:
            names = [n for n in entries if n.startswith(f"{weight}.")]
            constants = {n.removeprefix(f"{weight}."): found.pop(n) for n in names}
            found[weight] = _four_bit(name, entries[weight], constants)
        elif name.endswith(_SCALES) and stem + _WEIGHT in entries:
            codes = entries[stem + _WEIGHT]
            del found[name]
            found.pop(stem + _FORMAT, None)
            found[stem + _WEIGHT] = EightBitEntry(
                codes.file, torch.float16, codes.shape, codes.start, codes, entries[name]
            )
    return found


def _four_bit(name: str, codes: TensorEntry, constants: Mapping[str, TensorEntry]) -> FourBitEntry:
    """Return the entry of a weight. name: of the tensor with its description."""
    (state,) = (entry for own, entry in constants.items() if _STATE[1:] in own)
    try:
        content = json.loads(bytes(read_tensor(state).tolist()))
        shape, dtype = tuple(map(int, content["shape"])), torch_dtype(content["dtype"])
        int(content["blocksize"])
        if "nested_absmax" in constants:
            int(content["nested_blocksize"]), float(content["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ModelError(
            f"{name} is damaged: {fault!r}",
            where=str(state.file),
            hint="download the base again",
        ) from fault
    return FourBitEntry(codes.file, dtype, shape, codes.start, codes, constants, content)
