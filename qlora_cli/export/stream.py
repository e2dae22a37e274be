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

from qlora_cli.checkpoint.adapter import attach, fill
from qlora_cli.checkpoint.adapter_file import Adapter, AdapterLayer
from qlora_cli.memory.tracker import unallocated
from qlora_cli.nn import surgery
from qlora_cli.nn.embedding import HostEmbedding, has_own_memory
from qlora_cli.nn.lora import LoraLinear
from qlora_cli.weights import load
from qlora_cli.weights.built import Built
from qlora_cli.weights.source import Source


def stream(
    built: Built, source: Source, device: torch.device, adapter: Adapter | None = None
) -> None:
    """Lets a model on meta compute on `device`, in inference, with tensors from `source`.

    adapter: to be put on it. Raises ModelError where the source is not this model's.
    """
    load.rebuild_buffers(built, device)
    if has_own_memory(device):
        # A card never sees the table; the few rows that are looked up move.
        with unallocated():
            surgery.keep_on_host(built.model, built.family.token_embedding, device)
    needed: dict[str, list[tuple[str, load.Place]]] = defaultdict(list)
    for name, place in load.places(built, source, device).items():
        needed[name.rpartition(".")[0]].append((name, place))
    if adapter is not None:
        attach(built, adapter)
    layers = adapter.layers if adapter is not None else {}
    for path, own in needed.items():
        module = built.model.get_submodule(path)
        module.register_forward_pre_hook(_arrival(own, source, device, layers.get(path)))
        module.register_forward_hook(_leave)


def _arrival(
    own: list[tuple[str, load.Place]],
    source: Source,
    device: torch.device,
    layer: AdapterLayer | None,
) -> Callable[[nn.Module, Any], None]:
    def arrive(module: nn.Module, _: Any) -> None:
        for name, place in own:
            load.fill(place, source, name, device)
        if layer is not None:
            assert isinstance(module, LoraLinear)
            fill(module, layer, device)

    return arrive


def _leave(module: nn.Module, *_: Any) -> None:
    with unallocated():
        for part in module.modules():
            if isinstance(part, HostEmbedding):
                part.weight = torch.empty_like(part.weight, device="meta")
            for key, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, key, nn.Parameter(torch.empty_like(parameter, device="meta"), False))
