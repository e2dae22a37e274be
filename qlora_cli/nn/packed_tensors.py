"""The tensors of a packed linear, as they are written to a file and put back without quantizing.

The names are those of `files/packed_entry.py`, because a checkpoint may contain such tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora_cli.files.packed_entry import (
    CONSTANTS,
    OFFSET,
    SCALE,
    SCALE_OF_SCALE,
    WEIGHT,
    StoredFormat,
)
from qlora_cli.files.safetensors_io import TensorSpec
from qlora_cli.memory.scopes import attribute, unallocated
from qlora_cli.nn.packing import BLOCK_SIZE_4BIT, BLOCK_SIZE_SCALES, WeightFormat
from qlora_cli.nn.quant import QuantLinear


def is_in_format(own: WeightFormat, stored: StoredFormat) -> bool:
    """Return whether a weight stored in this form is the weight of a linear in the format `own`."""
    if own.bits == 8:
        return stored.bits == 8
    scale_block_size = BLOCK_SIZE_SCALES if own.double_quant else 0
    wanted = StoredFormat(4, own.quant_type, BLOCK_SIZE_4BIT, scale_block_size)
    return own.bits == 4 and stored == wanted


def packed_specs(linear: QuantLinear) -> dict[str, TensorSpec]:
    """Return name -> dtype and shape of the tensors of `linear` after `pack`."""
    weight_format, shape = linear.weight_format, (linear.out_features, linear.in_features)
    if weight_format.bits == 16:
        return {WEIGHT: TensorSpec(weight_format.storage, shape)}
    if weight_format.bits == 8:
        scale = TensorSpec(torch.float32, (linear.out_features,))
        return {WEIGHT: TensorSpec(torch.int8, shape), SCALE: scale}
    num_weights = linear.out_features * linear.in_features
    num_scales = -(-num_weights // BLOCK_SIZE_4BIT)
    weight = TensorSpec(torch.uint8, (-(-num_weights // 2), 1))
    if not weight_format.double_quant:
        return {WEIGHT: weight, SCALE: TensorSpec(torch.float32, (num_scales,))}
    return {
        WEIGHT: weight,
        SCALE: TensorSpec(torch.uint8, (num_scales,)),
        SCALE_OF_SCALE: TensorSpec(torch.float32, (-(-num_scales // BLOCK_SIZE_SCALES),)),
        OFFSET: TensorSpec(torch.float32, ()),
    }


def packed_tensors(linear: QuantLinear) -> dict[str, Tensor]:
    """Return name -> tensor of a packed linear."""
    constants = {name: getattr(linear, name) for name in CONSTANTS}
    present = {name: tensor for name, tensor in constants.items() if tensor is not None}
    return {WEIGHT: linear.weight.detach()} | {n: t.detach() for n, t in present.items()}


def put_packed(linear: QuantLinear, tensors: Mapping[str, Tensor], *, counted: bool = True) -> None:
    """Make `tensors`, which `packed_tensors` returned, the weight of a linear. None is copied.

    counted: count their memory under the linear's category; parts of a buffer are counted with it.
    """
    linear.weight = nn.Parameter(tensors[WEIGHT], requires_grad=False)
    for name in CONSTANTS:
        tensor = tensors.get(name)
        frozen = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        setattr(linear, name, frozen)
    if counted:
        attribute([linear.weight], linear.category)
        attribute(linear.constants(), "quant_constants")
    linear.renew_dequantized()


def pack_weight(weight_format: WeightFormat, weight: Tensor) -> QuantLinear:
    """Return a linear packed as in training. weight: (out, in), on the device that packs it."""
    out_features, in_features = weight.shape
    with unallocated():  # The weight on meta that `pack` replaces.
        layer = QuantLinear(in_features, out_features, bias=False, weight_format=weight_format)
    layer.pack(weight)
    return layer


def drop_packed(linear: QuantLinear) -> None:
    """Replace the weight and the scales of a packed linear by tensors without elements.

    The linear cannot compute until `put_packed` gives it its tensors again.
    """
    with unallocated():
        for name in ("weight", *CONSTANTS):
            tensor = getattr(linear, name)
            if tensor is not None:
                empty = torch.empty(0, dtype=tensor.dtype, device="meta")
                setattr(linear, name, nn.Parameter(empty, requires_grad=False))
