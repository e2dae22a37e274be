"""A model that computes without being held: a module's tensors are there while it computes.

Each module with weights of its own reads them when its turn comes and drops them behind it, so a
model of any size answers in the memory of its largest tensor and of the activations. One forward
reads the whole checkpoint once; so all rows go through in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.adapters.peft_file import AdapterFile, AdapterLayer
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import unallocated
from qlora_cli.models import convert
from qlora_cli.models.attach import attach, read_factors
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement import device as device_placement
from qlora_cli.nn.embedding import HostEmbedding, has_own_memory


def stream(
    loaded: LoadedModel,
    source: TensorSource,
    device: torch.device,
    adapter: AdapterFile | None = None,
) -> None:
    """Lets a model on meta compute on `device`, in inference, with tensors from `source`.

    adapter: to be put on it. Raises ModelError where the source is not this model's.
    """
    device_placement.rebuild_buffers(loaded, device)
    if has_own_memory(device):
        # A card never sees the table; the few rows that are looked up move.
        with unallocated():
            convert.keep_on_host(loaded.model, loaded.family.token_embedding, device)
    needed: dict[str, list[tuple[str, device_placement.Place]]] = defaultdict(list)
    for name, place in device_placement.places(loaded, source, device).items():
        needed[name.rpartition(".")[0]].append((name, place))
    if adapter is not None:
        attach(loaded, adapter)
    layers = adapter.layers if adapter is not None else {}
    for path, own in needed.items():
        module = loaded.model.get_submodule(path)
        module.register_forward_pre_hook(_arrival(own, source, device, layers.get(path)))
        module.register_forward_hook(_drop_weights)


def _arrival(
    own: list[tuple[str, device_placement.Place]],
    source: TensorSource,
    device: torch.device,
    layer: AdapterLayer | None,
) -> Callable[[nn.Module, Any], None]:
    def arrive(module: nn.Module, _: Any) -> None:
        for name, place in own:
            device_placement.fill(place, source, name, device)
        if layer is not None:
            assert isinstance(module, LoraLinear)
            read_factors(module, layer, device)

    return arrive


def _drop_weights(module: nn.Module, *_: Any) -> None:
    with unallocated():
        for part in module.modules():
            if isinstance(part, HostEmbedding):
                part.weight = torch.empty_like(part.weight, device="meta")
            for key, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, key, nn.Parameter(torch.empty_like(parameter, device="meta"), False))
