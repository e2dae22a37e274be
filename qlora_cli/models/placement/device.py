"""Fills a model's places from a source, one tensor at a time.

At any moment there is what is already packed, and one tensor. The order is the model's own and not
the file's, so that a plan, which knows no file, is of the same loading. The plan calls the same
functions with an imagined source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import attribute, host_memory, module_scope, scope
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel, is_tied
from qlora_cli.nn.embedding import HostEmbedding, upload
from qlora_cli.nn.quant import QuantLinear


def load(
    loaded: LoadedModel, source: TensorSource, device: torch.device, observer: Observer
) -> None:
    """Fills every place of the model from the source. Raises ModelError for what does not fit."""
    empty = places(loaded, source, device)
    observer.stage("load", len(empty))
    for done, name in enumerate(loading_order(empty, loaded.family.blocks), 1):
        with scope("temporary"), module_scope(name):
            fill(empty[name], source, name, device)
        observer.advance(done)
    if is_tied(loaded):
        _tie(loaded, source)
    rebuild_buffers(loaded, device)


@dataclass(frozen=True)
class Place:
    """Where one tensor of the checkpoint goes.

    shape: as in the file. put: takes it as the model holds it. on_host: it stays there. turned: the
    file holds (in, out). kept: the dtype of one that is held as it is. It is turned and cast on the
    host, so that the device never holds it twice.
    """

    shape: tuple[int, ...]
    put: Callable[[Tensor], None]
    on_host: bool = False
    turned: bool = False
    kept: torch.dtype | None = None


def places(loaded: LoadedModel, source: TensorSource, device: torch.device) -> dict[str, Place]:
    """Name -> place, of every tensor that a checkpoint of this model holds.

    The name leads to the module that needs the tensor: `<path>.weight` to the one at `path`. Raises
    ModelError where the source's names or shapes are others.
    """
    found = dict(_places(loaded, device))
    _check_names(loaded, source.names(), found)
    for name, place in found.items():
        _check_shape(name, source.shape(name), place.shape)
    return found


def _places(loaded: LoadedModel, device: torch.device) -> Iterator[tuple[str, Place]]:
    turned = {site.path for site in loaded.sites if site.transposed}
    tied = is_tied(loaded)
    for path, module in loaded.model.named_modules():
        if isinstance(module, QuantLinear):
            name = path.removesuffix(".base")
            if not (tied and name == loaded.family.head):
                yield f"{name}.weight", _packed_place(module, name in turned)
            if module.bias is not None:
                yield f"{name}.bias", _plain_place(module, "bias", "base", device)
            continue
        if isinstance(module, LoraLinear):
            continue
        if isinstance(module, HostEmbedding):
            yield f"{path}.weight", Place(tuple(module.weight.shape), module.put, on_host=True)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            category = _category(loaded, path)
            if not (tied and path == loaded.family.head):
                yield f"{path}.{key}", _plain_place(module, key, category, device, parameter.dtype)


def loading_order(places: Mapping[str, Place], blocks: str) -> list[str]:
    """What is of no block first, the largest before the smaller; then block after block.

    blocks: path of the block list. A table that is cast is there twice for a moment; so it comes
    while little else is there.
    """

    def key(name: str) -> tuple[bool, int]:
        in_block = name.startswith(f"{blocks}.")
        return in_block, 0 if in_block else -math.prod(places[name].shape)

    return sorted(places, key=key)


def _packed_place(module: QuantLinear, turned: bool) -> Place:
    shape = (module.out_features, module.in_features)
    kept = module.weight_format.storage if module.weight_format.bits == 16 else None
    return Place(shape[::-1] if turned else shape, module.pack, turned=turned, kept=kept)


def _plain_place(
    module: nn.Module,
    key: str,
    category: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Place:
    old: nn.Parameter = getattr(module, key)
    kept = dtype or old.dtype

    def put(tensor: Tensor) -> None:
        value = tensor.to(kept)
        attribute([value], category)
        setattr(module, key, nn.Parameter(value, requires_grad=old.requires_grad))

    return Place(tuple(old.shape), put, kept=kept)


def _category(loaded: LoadedModel, path: str) -> str:
    if path in loaded.family.embeddings:
        return "embeddings"
    return "head" if path == loaded.family.head else "base"


def fill(place: Place, source: TensorSource, name: str, device: torch.device) -> None:
    """Reads a tensor and puts it in its place on the device."""
    with host_memory():
        tensor = source.read(name)
        if place.on_host:
            place.put(tensor)
            return
        if place.turned:
            tensor = tensor.t().contiguous()
        tensor = tensor.to(place.kept or tensor.dtype)
    place.put(upload(tensor, device))


def _check_names(loaded: LoadedModel, names: Any, places: Mapping[str, Place]) -> None:
    present = set(names)
    missing = sorted(set(places) - present)
    allowed = {f"{loaded.family.head}.weight"} if is_tied(loaded) else set()
    unexpected = sorted(present - set(places) - allowed)
    if missing or unexpected:
        parts = [
            f"{word}: {', '.join(some[:5])}{' ...' if len(some) > 5 else ''}"
            for word, some in (("missing", missing), ("not of this model", unexpected))
            if some
        ]
        raise ModelError(
            "the checkpoint's tensors are not those of its config; " + "; ".join(parts),
            where="model.name",
            hint="fetch the whole folder again, or look whether config.json belongs to it",
        )


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise ModelError(
            f"{name} is {tuple(found)} in the checkpoint and {tuple(wanted)} by its config",
            where="model.name",
        )


def _tie(loaded: LoadedModel, source: TensorSource) -> None:
    """One parameter for table and head. A copy of the head in the checkpoint must be a copy."""
    table: Any = loaded.model.get_submodule(loaded.family.token_embedding).weight
    loaded.head.weight = table
    name = f"{loaded.family.head}.weight"
    if name not in source.names() or table.is_meta:
        return
    # As they lie in the file, so that the device need not hold it twice.
    if not torch.equal(source.read(name), source.read(f"{loaded.family.token_embedding}.weight")):
        raise ModelError(
            f"config.json ties {name} to the embedding, and the checkpoint has other values for it",
            where="model.name",
            hint='write "tie_word_embeddings": false into config.json if the head is its own',
        )


def rebuild_buffers(loaded: LoadedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are computed by their constructor."""
    for path, module in list(loaded.model.named_modules()):
        if device.type != "meta" and any(b.is_meta for b in module.buffers(recurse=False)):
            convert.replace(loaded.model, path, type(module)(loaded.config).to(device))
    attribute(loaded.model.buffers(), "base")
