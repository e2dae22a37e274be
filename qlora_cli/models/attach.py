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

from qlora_cli.adapters import peft_config
from qlora_cli.adapters.lora import LoraLinear, adapted_layers
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.adapters.peft_file import (
    SHOWN,
    AdapterFile,
    AdapterLayer,
    AdapterMetadata,
    open_adapter,
)
from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import RESUME_HINT, atomic_folder, report_write_errors, write_json
from qlora_cli.files.finite import finite_cpu_copy
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site
from qlora_cli.recipe import schema
from qlora_cli.recipe.schema import Recipe


def save_adapter(loaded: LoadedModel, recipe: Recipe, folder: Path) -> None:
    """Writes the adapter of `loaded`, whole or not at all; an older one there is replaced.

    Raises QloraError where the disk refuses, NotFinite where a value is NaN or infinite.
    """
    layers = dict(adapted_layers(loaded.model))
    shapes = {
        peft_config.key_of(path, factor): _shape_of(layer, factor)
        for path, layer in layers.items()
        for factor in "AB"
    }

    def make(key: str) -> Tensor:
        named = peft_config.path_of(key)
        assert named is not None
        return finite_cpu_copy(key, _stacked(layers[named[0]], named[1]))

    header = {"format": "pt", **_memory_of(loaded, layers, recipe.adapter).header()}
    with report_write_errors("the adapter", folder, RESUME_HINT), atomic_folder(folder) as beside:
        config = _config_of(loaded, layers, recipe)
        write_json(beside / peft_config.CONFIG, config.model_dump(mode="json"))
        write_tensors(beside / peft_config.WEIGHTS, shapes, make, header)


def _memory_of(
    loaded: LoadedModel, layers: Mapping[str, LoraLinear], settings: schema.Adapter
) -> AdapterMetadata:
    fused = {site.path for site in loaded.sites if len(site.roles) > 1}
    blocks = {
        path: {role: (rows.start, rows.stop) for role, rows in layer.lora_slices.items()}
        for path, layer in layers.items()
        if path in fused
    }
    return AdapterMetadata(settings.rank, settings.alpha, settings.rslora, blocks)


def _config_of(loaded: LoadedModel, layers: Mapping[str, LoraLinear], recipe: Recipe) -> PeftConfig:
    """The commonest rank stands for all, patterns for the rest: fewer readers know patterns."""
    modules = [name for name, _ in loaded.model.named_modules()]
    by_parts = Counter(len(layer.lora_slices) for layer in layers.values())
    commonest = by_parts.most_common(1)[0][0]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for num in by_parts.keys() - {commonest}:
        paths = [path for path, layer in layers.items() if len(layer.lora_slices) == num]
        for name in peft_config.shortest_names(paths, modules):
            ranks[name], alphas[name] = _widened(recipe.adapter, num)
    rank, alpha = _widened(recipe.adapter, commonest)
    return PeftConfig(
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=recipe.adapter.dropout,
        use_rslora=recipe.adapter.rslora,
        target_modules=peft_config.shortest_names(layers, modules),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=any(site.transposed for site in loaded.sites if site.path in layers),
    )


def _widened(adapter: schema.Adapter, num_parts: int) -> tuple[int, float]:
    """(rank, alpha) of a module with so many parts stacked, at the same scaling."""
    grown = num_parts**0.5 if adapter.rslora else num_parts
    return adapter.rank * num_parts, adapter.alpha * grown


def _shape_of(layer: LoraLinear, factor: str) -> TensorSpec:
    stacked = layer.settings.rank * len(layer.lora_slices)
    if factor == "A":
        return TensorSpec(layer.settings.dtype, (stacked, layer.base.in_features))
    return TensorSpec(layer.settings.dtype, (layer.base.out_features, stacked))


def _stacked(layer: LoraLinear, factor: str) -> Tensor:
    """A (parts * rank, in), or B (out, parts * rank) with a block a part."""
    if factor == "A":
        return torch.cat([layer.lora_a[role].detach() for role in layer.lora_slices])
    rank, shape = layer.settings.rank, _shape_of(layer, "B")
    first = next(iter(layer.lora_b.values()))
    b = torch.zeros(shape.shape, dtype=shape.dtype, device=first.device)
    for index, (role, rows) in enumerate(layer.lora_slices.items()):
        b[rows, index * rank : (index + 1) * rank] = layer.lora_b[role].detach()
    return b


@torch.no_grad()
def load_adapter(loaded: LoadedModel, folder: Path) -> None:
    """Copies an adapter's values into the adapter that `loaded` has, which must be the same one.

    Parameters stay the same objects, so an optimizer may already hold them. Raises ModelError or
    ProblemsError where layers, parts, rank, scaling or dtype differ.
    """
    adapter = open_adapter(folder)
    adapter.check(loaded.sites)
    layers = dict(adapted_layers(loaded.model))
    sites = {site.path: site for site in loaded.sites}
    other = sorted(layers.keys() ^ adapter.layers.keys())
    if other:
        raise ModelError(
            f"the adapter and the recipe adapt other layers: {', '.join(other[:SHOWN])}",
            where=str(folder),
        )
    for path, source in adapter.layers.items():
        _check_same(layers[path], source, sites[path], folder)
        for role, part in zip(layers[path].lora_slices, source.read(), strict=True):
            layers[path].lora_a[role].copy_(part.a)
            layers[path].lora_b[role].copy_(part.b)


def _check_same(layer: LoraLinear, source: AdapterLayer, site: Site, folder: Path) -> None:
    own, recipe = source.settings, layer.settings
    told: dict[str, tuple[Any, Any]] = {
        "parts": (list(source.slices_on(site)), list(layer.lora_slices)),
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


def remove_adapter(loaded: LoadedModel) -> None:
    """Takes the adapter away: what stays is the frozen base as training held it."""
    set_adapter_layers(loaded, {})


def attach_adapter(loaded: LoadedModel, adapter: AdapterFile) -> None:
    """Gives `loaded` this adapter instead of the one it has, whatever its parts and ranks.

    For answering, not for going on with training. Raises ProblemsError where it does not fit.
    """
    set_adapter_layers(loaded, adapter_layers_for(loaded, adapter))


def adapter_layers_for(loaded: LoadedModel, adapter: AdapterFile) -> dict[str, LoraLinear]:
    """Path -> the adapter's layer over that packed linear of `loaded`, which stays as it is.

    Frozen, for answering. Raises ProblemsError where the adapter does not fit.
    """
    adapter.check(loaded.sites)
    sites = {site.path: site for site in loaded.sites}
    return {
        path: _adapted(_linear_at(loaded, path), layer, sites[path])
        for path, layer in adapter.layers.items()
    }


def set_adapter_layers(loaded: LoadedModel, layers: Mapping[str, LoraLinear]) -> None:
    """Puts these layers in place and takes away all others. No weight is moved or changed."""
    loaded.adapted = {path: list(layer.lora_slices) for path, layer in layers.items()}
    for site in loaded.sites:
        new = layers.get(site.path, _linear_at(loaded, site.path))
        convert.replace_module(loaded.model, site.path, new)


def _linear_at(loaded: LoadedModel, path: str) -> Any:
    """The linear itself, without the adapter's layer around it."""
    module = loaded.model.get_submodule(path)
    return module.base if isinstance(module, LoraLinear) else module


def _adapted(base: QuantLinear, source: AdapterLayer, site: Site) -> LoraLinear:
    layer = LoraLinear(base, source.slices_on(site), source.settings)
    load_lora_weights(layer, source, base.weight.device)
    return layer.eval()


def load_lora_weights(layer: LoraLinear, source: AdapterLayer, device: torch.device) -> None:
    """Reads the layer's A and B from the adapter's file; frozen."""
    for role, part in zip(layer.lora_slices, source.read(), strict=True):
        layer.lora_a[role] = nn.Parameter(part.a.to(device), requires_grad=False)
        layer.lora_b[role] = nn.Parameter(part.b.to(device), requires_grad=False)
