"""One weight of the base, packed as training used it."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.files.source import FolderSource
from qlora_cli.models.placement.held import stored_tensors
from qlora_cli.nn.packed_tensors import put_packed
from qlora_cli.nn.quant import QuantLinear, WeightFormat
from qlora_cli.nn.site import Site


def trained_weight(
    name: str, site: Site, source: FolderSource, weight_format: WeightFormat, device: torch.device
) -> QuantLinear:
    """Return a linear with a weight of the base as training used it.

    name: of the weight in `source`. site: the linear. device: packs the weight, unless the
    checkpoint contains it in this format.
    """
    layer = QuantLinear(site.in_features, site.out_features, False, weight_format)
    stored = stored_tensors(name, layer, site, source)
    if stored is None:
        return pack_weight(weight_format, site.from_file(source.read(name)).contiguous().to(device))
    put_packed(layer, {key: tensor.to(device) for key, tensor in stored.items()})
    return layer


def pack_weight(weight_format: WeightFormat, weight: Tensor) -> QuantLinear:
    """Return a linear packed as in training. weight: (out, in), on the device that packs it."""
    out_features, in_features = weight.shape
    layer = QuantLinear(in_features, out_features, bias=False, weight_format=weight_format)
    layer.pack(weight)
    return layer
