"""A built model's adapter, written to a folder in PEFT's format and read back exactly.

`load_adapter` fills the adapter that training made; `attach` gives a model whatever adapter a
folder holds. How the format carries several parts of a fused projection: see `adapter_file.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.checkpoint import peft_format
from qlora_cli.checkpoint.adapter_file import SHOWN, Adapter, AdapterLayer, Memory, open_adapter
from qlora_cli.checkpoint.finite import on_host
from qlora_cli.checkpoint.layout import RESUME, appear_whole, write_json, writing
from qlora_cli.checkpoint.peft_format import PeftConfig
from qlora_cli.errors import ModelError
from qlora_cli.nn import surgery
from qlora_cli.nn.lora import LoraLinear, adapted_layers
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.surgery import Site
from qlora_cli.recipe import schema
from qlora_cli.recipe.schema import Recipe
from qlora_cli.weights.built import Built
from qlora_cli.weights.tensorfile import Shape, write_tensors


def save_adapter(built: Built, recipe: Recipe, folder: Path) -> None:
    """Writes the adapter of `built`, whole or not at all; an older one there is replaced.

    Raises QloraError where the disk refuses, NotFinite where a value is NaN or infinite.
    """
    layers = dict(adapted_layers(built.model))
    shapes = {
        peft_format.key_of(path, factor): _shape_of(layer, factor)
        for path, layer in layers.items()
        for factor in "AB"
    }

    def make(key: str) -> Tensor:
        named = peft_format.path_of(key)
        assert named is not None
        return on_host(key, _stacked(layers[named[0]], named[1]))

    header = {"format": "pt", **_memory_of(built, layers, recipe.adapter).header()}
    with writing("the adapter", folder, RESUME), appear_whole(folder) as beside:
        config = _config_of(built, layers, recipe)
        write_json(beside / peft_format.CONFIG, config.model_dump(mode="json"))
        write_tensors(beside / peft_format.WEIGHTS, shapes, make, header)


def _memory_of(built: Built, layers: Mapping[str, LoraLinear], settings: schema.Adapter) -> Memory:
    fused = {site.path for site in built.sites if len(site.roles) > 1}
    blocks = {
        path: {role: (rows.start, rows.stop) for role, rows in layer.parts.items()}
        for path, layer in layers.items()
        if path in fused
    }
    return Memory(settings.rank, settings.alpha, settings.rslora, blocks)


def _config_of(built: Built, layers: Mapping[str, LoraLinear], recipe: Recipe) -> PeftConfig:
    """The commonest rank stands for all, patterns for the rest: fewer readers know patterns."""
    modules = [name for name, _ in built.model.named_modules()]
    by_parts = Counter(len(layer.parts) for layer in layers.values())
    commonest = by_parts.most_common(1)[0][0]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for num in by_parts.keys() - {commonest}:
        paths = [path for path, layer in layers.items() if len(layer.parts) == num]
        for name in peft_format.shortest_names(paths, modules):
            ranks[name], alphas[name] = _widened(recipe.adapter, num)
    rank, alpha = _widened(recipe.adapter, commonest)
    return PeftConfig(
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=recipe.adapter.dropout,
        use_rslora=recipe.adapter.rslora,
        target_modules=peft_format.shortest_names(layers, modules),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=any(site.transposed for site in built.sites if site.path in layers),
    )


def _widened(adapter: schema.Adapter, num_parts: int) -> tuple[int, float]:
    """(rank, alpha) of a module with so many parts stacked, at the same scaling."""
    grown = num_parts**0.5 if adapter.rslora else num_parts
    return adapter.rank * num_parts, adapter.alpha * grown


def _shape_of(layer: LoraLinear, factor: str) -> Shape:
    stacked = layer.settings.rank * len(layer.parts)
    if factor == "A":
        return Shape(layer.settings.dtype, (stacked, layer.base.in_features))
    return Shape(layer.settings.dtype, (layer.base.out_features, stacked))


def _stacked(layer: LoraLinear, factor: str) -> Tensor:
    """A (parts * rank, in), or B (out, parts * rank) with a block a part."""
    if factor == "A":
        return torch.cat([layer.lora_a[role].detach() for role in layer.parts])
    rank, shape = layer.settings.rank, _shape_of(layer, "B")
    first = next(iter(layer.lora_b.values()))
    b = torch.zeros(shape.shape, dtype=shape.dtype, device=first.device)
    for index, (role, rows) in enumerate(layer.parts.items()):
        b[rows, index * rank : (index + 1) * rank] = layer.lora_b[role].detach()
    return b


@torch.no_grad()
def load_adapter(built: Built, folder: Path) -> None:
    """Copies an adapter's values into the adapter that `built` has, which must be the same one.

    Parameters stay the same objects, so an optimizer may already hold them. Raises ModelError or
    ProblemsError where layers, parts, rank, scaling or dtype differ.
    """
    adapter = open_adapter(folder)
    adapter.check(built.sites)
    layers = dict(adapted_layers(built.model))
    sites = {site.path: site for site in built.sites}
    other = sorted(layers.keys() ^ adapter.layers.keys())
    if other:
        raise ModelError(
            f"the adapter and the recipe adapt other layers: {', '.join(other[:SHOWN])}",
            where=str(folder),
        )
    for path, source in adapter.layers.items():
        _check_same(layers[path], source, sites[path], folder)
        for role, part in zip(layers[path].parts, source.read(), strict=True):
            layers[path].lora_a[role].copy_(part.a)
            layers[path].lora_b[role].copy_(part.b)


def _check_same(layer: LoraLinear, source: AdapterLayer, site: Site, folder: Path) -> None:
    own, recipe = source.settings, layer.settings
    told: dict[str, tuple[Any, Any]] = {
        "parts": (list(source.rows_on(site)), list(layer.parts)),
        "rank": (own.rank, recipe.rank),
        "scaling": (own.scaling, recipe.scaling),
        "dtype": (own.dtype, recipe.dtype),
    }
    for name, (there, here) in told.items():
        if here != there:
            raise ModelError(
                f"{source.path}: {name} is {there} in the adapter and {here} by the recipe",
                where=str(folder),
            )


def detach(built: Built) -> None:
    """Takes the adapter away: what stays is the frozen base as training held it."""
    put(built, {})


def attach(built: Built, adapter: Adapter) -> None:
    """Gives `built` this adapter instead of the one it has, whatever its parts and ranks.

    For answering, not for going on with training. Raises ProblemsError where it does not fit.
    """
    put(built, layers_on(built, adapter))


def layers_on(built: Built, adapter: Adapter) -> dict[str, LoraLinear]:
    """Path -> the adapter's layer over that packed linear of `built`, which stays as it is.

    Frozen, for answering. Raises ProblemsError where the adapter does not fit.
    """
    adapter.check(built.sites)
    sites = {site.path: site for site in built.sites}
    return {
        path: _adapted(_linear_at(built, path), layer, sites[path])
        for path, layer in adapter.layers.items()
    }


def put(built: Built, layers: Mapping[str, LoraLinear]) -> None:
    """Puts these layers in place and takes away all others. No weight is moved or changed."""
    built.adapted = {path: list(layer.parts) for path, layer in layers.items()}
    for site in built.sites:
        new = layers.get(site.path, _linear_at(built, site.path))
        surgery.replace(built.model, site.path, new)


def _linear_at(built: Built, path: str) -> Any:
    """The linear itself, without the adapter's layer around it."""
    module = built.model.get_submodule(path)
    return module.base if isinstance(module, LoraLinear) else module


def _adapted(base: QuantLinear, source: AdapterLayer, site: Site) -> LoraLinear:
    layer = LoraLinear(base, source.rows_on(site), source.settings)
    fill(layer, source, base.weight.device)
    return layer.eval()


def fill(layer: LoraLinear, source: AdapterLayer, device: torch.device) -> None:
    """Reads the layer's A and B from the adapter's file; frozen."""
    for role, part in zip(layer.parts, source.read(), strict=True):
        layer.lora_a[role] = nn.Parameter(part.a.to(device), requires_grad=False)
        layer.lora_b[role] = nn.Parameter(part.b.to(device), requires_grad=False)
