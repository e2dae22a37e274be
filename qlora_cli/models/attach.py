"""Writes a model's adapter to a folder in PEFT's format and reads it back exactly.

`load_adapter` reads values into the existing adapter of a model. `attach_adapter` replaces the
model's adapter by that of a folder, which may have other targets and ranks. See
`adapters/peft_file.py` for how several roles of a fused projection are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.adapters import peft_config
from qlora_cli.adapters.lora import LoraLinear, adapted_layers
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.adapters.peft_file import (
    MAX_LISTED,
    AdapterFile,
    AdapterLayer,
    AdapterMetadata,
    open_adapter,
)
from qlora_cli.data.template import TEMPLATE_FILE
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


def save_adapter(
    loaded: LoadedModel, recipe: Recipe, folder: Path, chat_template: str | None = None
) -> None:
    """Write the adapter of `loaded` atomically; an older adapter in `folder` is replaced.

    recipe: the recipe that the adapter was trained with. chat_template: the Jinja text of its
    training if that is not the base's, which is written next to the adapter.

    Raises QloraError if it cannot be written, NotFinite if a value is NaN or infinite.
    """
    layers = dict(adapted_layers(loaded.model))
    specs = {
        peft_config.tensor_name(path, factor): _stacked_spec(layer, factor)
        for path, layer in layers.items()
        for factor in "AB"
    }

    def compute(name: str) -> Tensor:
        parsed = peft_config.parse_tensor_name(name)
        assert parsed is not None
        path, factor = parsed
        return finite_cpu_copy(name, _stacked(layers[path], factor))

    header = {"format": "pt", **_metadata(loaded, layers, recipe.adapter).header()}
    with report_write_errors("the adapter", folder, RESUME_HINT), atomic_folder(folder) as partial:
        config = _peft_config(loaded, layers, recipe)
        write_json(partial / peft_config.CONFIG, config.model_dump(mode="json"))
        write_tensors(partial / peft_config.WEIGHTS, specs, compute, header)
        if chat_template is not None:
            (partial / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def _metadata(
    loaded: LoadedModel, layers: Mapping[str, LoraLinear], settings: schema.Adapter
) -> AdapterMetadata:
    fused = {site.path for site in loaded.sites if len(site.roles) > 1}
    blocks = {
        path: {role: (rows.start, rows.stop) for role, rows in layer.lora_slices.items()}
        for path, layer in layers.items()
        if path in fused
    }
    return AdapterMetadata(settings.rank, settings.alpha, settings.rslora, blocks)


def _peft_config(
    loaded: LoadedModel, layers: Mapping[str, LoraLinear], recipe: Recipe
) -> PeftConfig:
    """Return the adapter's settings for PEFT.

    The most common rank becomes the rank of the adapter and other ranks become patterns, because
    not every program that reads adapters supports patterns.
    """
    modules = [name for name, _ in loaded.model.named_modules()]
    num_roles = Counter(len(layer.lora_slices) for layer in layers.values())
    most_common = num_roles.most_common(1)[0][0]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for num in num_roles.keys() - {most_common}:
        paths = [path for path, layer in layers.items() if len(layer.lora_slices) == num]
        for name in peft_config.shortest_endings(paths, modules):
            ranks[name], alphas[name] = _stacked_settings(recipe.adapter, num)
    rank, alpha = _stacked_settings(recipe.adapter, most_common)
    return PeftConfig(
        base_model_name_or_path=recipe.model.name,
        revision=recipe.model.revision,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=recipe.adapter.dropout,
        use_rslora=recipe.adapter.rslora,
        target_modules=peft_config.shortest_endings(layers, modules),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=any(site.transposed for site in loaded.sites if site.path in layers),
    )


def _stacked_settings(adapter: schema.Adapter, num_roles: int) -> tuple[int, float]:
    """Return (rank, alpha) of `num_roles` stacked adapters, with unchanged scaling."""
    factor = num_roles**0.5 if adapter.rslora else num_roles
    return adapter.rank * num_roles, adapter.alpha * factor


def _stacked_spec(layer: LoraLinear, factor: str) -> TensorSpec:
    """Return dtype and shape of the layer's stacked A or B. factor: `A` or `B`."""
    stacked = layer.settings.rank * len(layer.lora_slices)
    if factor == "A":
        return TensorSpec(layer.settings.dtype, (stacked, layer.base.in_features))
    return TensorSpec(layer.settings.dtype, (layer.base.out_features, stacked))


def _stacked(layer: LoraLinear, factor: str) -> Tensor:
    """Return A (roles * rank, in), or B (out, roles * rank) with one block per role."""
    if factor == "A":
        return torch.cat([layer.lora_a[role].detach() for role in layer.lora_slices])
    rank, spec = layer.settings.rank, _stacked_spec(layer, "B")
    first = next(iter(layer.lora_b.values()))
    b = torch.zeros(spec.shape, dtype=spec.dtype, device=first.device)
    for index, (role, rows) in enumerate(layer.lora_slices.items()):
        b[rows, index * rank : (index + 1) * rank] = layer.lora_b[role].detach()
    return b


@torch.no_grad()
def load_adapter(loaded: LoadedModel, folder: Path) -> None:
    """Copy an adapter's values into the adapter that `loaded` has.

    The parameters stay the same objects, so that an optimizer can refer to them. Raises ModelError
    or ProblemsError if the two adapters differ in layers, roles, rank, scaling or dtype.
    """
    adapter = open_adapter(folder)
    adapter.check(loaded.sites)
    layers = dict(adapted_layers(loaded.model))
    sites = {site.path: site for site in loaded.sites}
    different = sorted(layers.keys() ^ adapter.layers.keys())
    if different:
        raise ModelError(
            f"the adapter and the recipe adapt other layers: {', '.join(different[:MAX_LISTED])}",
            where=str(folder),
        )
    for path, source in adapter.layers.items():
        _check_same(layers[path], source, sites[path], folder)
        for role, update in zip(layers[path].lora_slices, source.read(), strict=True):
            layers[path].lora_a[role].copy_(update.a)
            layers[path].lora_b[role].copy_(update.b)


def _check_same(layer: LoraLinear, source: AdapterLayer, site: Site, folder: Path) -> None:
    """Raise ModelError if a stored layer and a layer of the model differ in their settings."""
    own, recipe = source.settings, layer.settings
    settings: dict[str, tuple[Any, Any]] = {
        "roles": (list(source.slices_on(site)), list(layer.lora_slices)),
        "rank": (own.rank, recipe.rank),
        "scaling": (own.scaling, recipe.scaling),
        "dtype": (own.dtype, recipe.dtype),
    }
    for name, (stored, current) in settings.items():
        if stored != current:
            raise ModelError(
                f"{source.path}: {name} is {stored} in the adapter and {current} in the recipe",
                where=str(folder),
            )


def remove_adapter(loaded: LoadedModel) -> None:
    """Remove the adapter of `loaded`. The frozen base remains, quantized as in training."""
    set_adapter_layers(loaded, {})


@contextmanager
def adapter_replaced(loaded: LoadedModel, layers: Mapping[str, LoraLinear]) -> Iterator[None]:
    """Make `layers` the adapter of `loaded` inside the block; none if it is empty.

    layers: as of `set_adapter_layers`. No weight is copied.
    """
    own = dict(adapted_layers(loaded.model))
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


def adapter_layers_for(loaded: LoadedModel, adapter: AdapterFile) -> dict[str, LoraLinear]:
    """Load an adapter and return path -> its layer around the linear layer of `loaded`.

    `loaded` is not changed; pass the result to `set_adapter_layers`. The parameters are frozen, on
    the device of the base. Raises ProblemsError if the adapter does not fit the base.
    """
    adapter.check(loaded.sites)
    sites = {site.path: site for site in loaded.sites}
    return {
        path: _adapted(_linear_at(loaded, path), layer, sites[path])
        for path, layer in adapter.layers.items()
    }


def set_adapter_layers(loaded: LoadedModel, layers: Mapping[str, LoraLinear]) -> None:
    """Make `layers` the adapter of `loaded` and remove all other adapter layers.

    layers: path -> layer, from `adapter_layers_for` on the same model. No weight is copied.
    """
    loaded.adapted = {path: list(layer.lora_slices) for path, layer in layers.items()}
    for site in loaded.sites:
        new = layers.get(site.path, _linear_at(loaded, site.path))
        convert.replace_module(loaded.model, site.path, new)


def _linear_at(loaded: LoadedModel, path: str) -> Any:
    """Return the linear layer at `path` without the adapter's layer around it."""
    module = loaded.model.get_submodule(path)
    return module.base if isinstance(module, LoraLinear) else module


def _adapted(base: QuantLinear, source: AdapterLayer, site: Site) -> LoraLinear:
    """Return a stored adapter layer around `base`, frozen and in eval mode."""
    layer = LoraLinear(base, source.slices_on(site), source.settings)
    load_lora_weights(layer, source, base.weight.device)
    return layer.eval()


def load_lora_weights(layer: LoraLinear, source: AdapterLayer, device: torch.device) -> None:
    """Read the A and B of `layer` from `source` to `device`, as frozen parameters."""
    for role, update in zip(layer.lora_slices, source.read(), strict=True):
        layer.lora_a[role] = nn.Parameter(update.a.to(device), requires_grad=False)
        layer.lora_b[role] = nn.Parameter(update.b.to(device), requires_grad=False)
