"""One weight of the base, packed as training used it."""

from __future__ import annotations

import torch

from qlora_cli.files.source import TensorSource
from qlora_cli.models.placement.held import stored_tensors
from qlora_cli.nn.packed_tensors import pack_weight, put_packed
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site


def trained_weight(
    name: str, site: Site, source: TensorSource, weight_format: WeightFormat, device: torch.device
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
