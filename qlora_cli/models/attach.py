"""Reads adapters in PEFT's format into a model. `save_adapter.py` writes them.

`load_adapter` reads values into the existing adapter of a model. `attach_adapter` replaces the
model's adapter by that of a folder, which may have other targets and ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.adapted_modules import (
    LoraModule,
    adapted_layers,
    adapted_modules,
    adapted_stacks,
)
from qlora_cli.adapters.dora import DoraLinear
from qlora_cli.adapters.lora import LoraLinear, LoraSettings
from qlora_cli.adapters.lora_experts import LoraStack
from qlora_cli.adapters.peft_file import (
    MAX_LISTED,
    AdapterFile,
    AdapterLayer,
    open_adapter,
)
from qlora_cli.adapters.peft_stacks import AdapterStack
from qlora_cli.adapters.targets import EXPERTS
from qlora_cli.errors import ModelError
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.prefix import activate_prefix, load_prefix
from qlora_cli.models.trained_head import check_head, load_head
from qlora_cli.models.tying import share_modules
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.site import Site


@torch.no_grad()
def load_adapter(loaded: LoadedModel, folder: Path) -> None:
    """Copy an adapter's values into the adapter that `loaded` has.

    The parameters stay the same objects, so that an optimizer can refer to them. Raises ModelError
    or ProblemsError if the two adapters differ in layers, roles, rank, scaling or dtype.
    """
    adapter = open_adapter(folder)
    adapter.check([*loaded.sites, *loaded.stacks])
    check_head(loaded, adapter)
    layers = dict(adapted_layers(loaded.model))
    stacks = dict(adapted_stacks(loaded.model))
    sites = {site.path: site for site in loaded.sites}
    different = sorted(
        {*(layers.keys() ^ adapter.layers.keys()), *(stacks.keys() ^ adapter.stacks.keys())}
    )
    if different:
        raise ModelError(
            f"the adapter and the recipe adapt other layers: {', '.join(different[:MAX_LISTED])}",
            where=str(folder),
        )
    for path, source in adapter.layers.items():
        _check_same(layers[path], source, sites[path], folder)
        for role, update in zip(layers[path].lora_slices, source.read(), strict=True):
            layer = layers[path]
            layer.lora_a[role].copy_(update.a)
            layer.lora_b[role].copy_(update.b)
            if update.magnitude is not None:
                assert isinstance(layer, DoraLinear)
                layer.lora_magnitude[role].copy_(update.magnitude)
    for path, stored in adapter.stacks.items():
        _check_settings(path, stored.settings, stacks[path].settings, {}, folder)
        values, lora = stored.read(), stacks[path].lora()
        lora.a.copy_(values.a)
        lora.b.copy_(values.b)
    load_head(loaded, adapter)
    load_prefix(loaded, adapter.prefix)


def _check_same(layer: LoraLinear, source: AdapterLayer, site: Site, folder: Path) -> None:
    """Raise ModelError if a stored layer and a layer of the model differ in their settings."""
    others = {
        "roles": (list(source.slices_on(site)), list(layer.lora_slices)),
        "whether it is DoRA": (source.magnitude is not None, isinstance(layer, DoraLinear)),
    }
    _check_settings(source.path, source.settings, layer.settings, others, folder)


def _check_settings(
    path: str,
    own: LoraSettings,
    recipe: LoraSettings,
    others: Mapping[str, tuple[Any, Any]],
    folder: Path,
) -> None:
    """Raise ModelError if two settings differ. others: name -> (stored, in the recipe)."""
    settings: dict[str, tuple[Any, Any]] = {
        **others,
        "rank": (own.rank, recipe.rank),
        "scaling": (own.scaling, recipe.scaling),
        "dtype": (own.dtype, recipe.dtype),
    }
    for name, (stored, current) in settings.items():
        if stored != current:
            raise ModelError(
                f"{path}: {name} is {stored} in the adapter and {current} in the recipe",
                where=str(folder),
            )


def remove_adapter(loaded: LoadedModel) -> None:
    """Remove the adapter of `loaded`. The frozen base remains, quantized as in training."""
    set_adapter_layers(loaded, {})


@contextmanager
def adapter_replaced(loaded: LoadedModel, layers: Mapping[str, LoraModule]) -> Iterator[None]:
    """Make `layers` the adapter of `loaded` inside the block; none if it is empty.

    layers: as of `set_adapter_layers`. No weight is copied.
    """
    own = dict(adapted_modules(loaded.model))
    set_adapter_layers(loaded, layers)
    try:
        yield
    finally:
        set_adapter_layers(loaded, own)


def attach_adapter(loaded: LoadedModel, adapter: AdapterFile) -> None:
    """Replace the adapter of `loaded` by `adapter`, whose targets and ranks may differ.

    The adapter's parameters are frozen: use it for inference, not to resume training. Raises
    ProblemsError if the adapter does not fit the base.
    """
    set_adapter_layers(loaded, adapter_layers_for(loaded, adapter))


def adapter_layers_for(loaded: LoadedModel, adapter: AdapterFile) -> dict[str, LoraModule]:
    """Load an adapter and return path -> its module around the linear or the stack of `loaded`.

    `loaded` is not changed; pass the result to `set_adapter_layers`. The parameters are frozen, on
    the device of the base. Raises ProblemsError if the adapter does not fit the base.
    """
    adapter.check([*loaded.sites, *loaded.stacks])
    check_head(loaded, adapter)
    sites = {site.path: site for site in loaded.sites}
    layers: dict[str, LoraModule] = {
        path: _adapted(loaded, layer, sites[path]) for path, layer in adapter.layers.items()
    }
    for path, source in adapter.stacks.items():
        stack = LoraStack(base_at(loaded, path), source.settings)
        load_stack_weights(stack, source, _device_of(loaded, stack.base.device))
        layers[path] = stack.eval()
    return layers


def set_adapter_layers(loaded: LoadedModel, layers: Mapping[str, LoraModule]) -> None:
    """Make `layers` the adapter of `loaded` and remove all other adapter layers.

    layers: path -> layer, from `adapter_layers_for` on the same model. No weight is copied. Without
    layers the model is the one before training, and a prefix has no effect.
    """
    loaded.adapted = {
        path: list(layer.lora_slices) if isinstance(layer, LoraLinear) else [EXPERTS]
        for path, layer in layers.items()
    }
    activate_prefix(loaded.model, bool(layers))
    for site in (*loaded.sites, *loaded.stacks):
        new: nn.Module = base_at(loaded, site.path)
        if site.path in layers:
            new = layers[site.path]
        elif not layers:
            new = loaded.initial.get(site.path, new)
        convert.replace_module(loaded.model, site.path, new)
    share_modules(loaded.model, loaded.family.shared)


def base_at(loaded: LoadedModel, path: str) -> Any:
    """Return the linear or the stack at `path` without the adapter's module around it."""
    module = loaded.model.get_submodule(path)
    return module.base if isinstance(module, LoraLinear | LoraStack) else module


def _device_of(loaded: LoadedModel, device: torch.device) -> torch.device:
    """Return the device that computes.

    device: that of a weight. It is returned unless the weights of blocks are streamed.
    """
    return loaded.stream.device if loaded.stream is not None else device


def _adapted(loaded: LoadedModel, source: AdapterLayer, site: Site) -> LoraLinear:
    """Return a stored adapter layer around the linear at `site`, frozen and in eval mode."""
    base: QuantLinear = base_at(loaded, site.path)
    kind = LoraLinear if source.magnitude is None else DoraLinear
    layer = kind(base, source.slices_on(site), source.settings)
    load_lora_weights(layer, source, _device_of(loaded, base.weight.device))
    return layer.eval()


def load_lora_weights(layer: LoraLinear, source: AdapterLayer, device: torch.device) -> None:
    """Read the A and B of `layer` from `source` to `device`, as frozen parameters."""
    for role, update in zip(layer.lora_slices, source.read(), strict=True):
        layer.lora_a[role] = nn.Parameter(update.a.to(device), requires_grad=False)
        layer.lora_b[role] = nn.Parameter(update.b.to(device), requires_grad=False)
        if update.magnitude is not None:
            assert isinstance(layer, DoraLinear)
            magnitude = update.magnitude.float().to(device)
            layer.lora_magnitude[role] = nn.Parameter(magnitude, requires_grad=False)
            layer.forget_lengths()


def load_stack_weights(module: LoraStack, source: AdapterStack, device: torch.device) -> None:
    """Read the A and B of experts from `source` to `device`, as frozen parameters."""
    lora = source.read()
    module.set_factors(lora.a.to(device), lora.b.to(device), trained=False)
