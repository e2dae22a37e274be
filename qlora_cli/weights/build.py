"""The base, streamed: one tensor at a time from its source, quantized as it arrives.

The model is made on meta, gets its packed linears and adapters there (`nn/surgery.py`), and then
each tensor of the source goes to its place. No full-precision copy of the model ever exists: at
any moment there is what is already packed, and one tensor. The plan calls the same function with
an imagined source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.families.registry import family_of, is_known
from qlora_cli.families.sites import find_sites, mlp_paths, norm_paths
from qlora_cli.families.spec import Family
from qlora_cli.memory.tracker import attribute, host_memory, scope, unallocated, within
from qlora_cli.nn import attention, surgery
from qlora_cli.nn.embedding import HostEmbedding, has_own_memory, upload
from qlora_cli.nn.lora import LoraLinear, Settings, adapted_layers
from qlora_cli.nn.quant import Format, QuantLinear
from qlora_cli.recipe.schema import Recipe
from qlora_cli.weights.source import Source


@dataclass
class Built:
    """A model ready to train or to answer.

    sites: every linear the family knows. adapted: path -> roles with an adapter. kernel: of
    attention; a plan sets that of the device which it imagines.
    """

    model: Any
    family: Family
    config: Any
    sites: list[surgery.Site]
    adapted: dict[str, list[str]]
    held: Format
    kernel: attention.Kernel

    @property
    def head(self) -> nn.Module:
        """The module whose weight (V, d) turns hidden states into logits."""
        return self.model.get_submodule(self.family.head)  # type: ignore[no-any-return]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of what the optimizer moves."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def storage_dtype(file: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """Of weights that are not packed: 16 bit always, the file's own where it is 16 bit.

    A 16-bit compute dtype decides, because a product needs both sides in it.
    """
    if compute.itemsize == 2:
        return compute
    return file if file.itemsize == 2 else torch.float16


def format_of(recipe: Recipe, file_dtype: torch.dtype) -> Format:
    """How a resolved recipe holds a base whose files are in `file_dtype`."""
    compute = torch_dtype(recipe.base.compute_dtype)
    return Format(
        bits=recipe.base.bits,
        compute=compute,
        storage=storage_dtype(file_dtype, compute),
        quant_type=recipe.base.quant_type,
        double_quant=recipe.base.double_quant,
        threshold=recipe.base.outlier_threshold,
    )


def skeleton(config: Any, compute: torch.dtype) -> tuple[Any, Family]:
    """(transformers' model on meta, its family). Raises ModelError for an unknown family."""
    from transformers import AutoModelForCausalLM

    if not is_known(config):
        family_of(config, _linears_of_a_block(config))
    family = family_of(config)
    # The base's own dropout is off: the adapter has its own, and dropped activations are kept.
    for key in family.dropouts:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention.NAME, dtype=compute
        )
    # Batches have no padding; told of a pad token, GPT-2 would look for it in every batch.
    model.config.pad_token_id = None
    return model, family


def _linears_of_a_block(config: Any) -> list[str]:
    """Paths within the first block of a model of any family, for the error about an unknown one."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, ImportError):  # Not a causal model, or one that needs more.
        return []
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = next((blocks for blocks in lists if len(blocks)), None)
    return surgery.linear_paths(blocks[0]) if blocks is not None else []


def build(
    recipe: Recipe,
    config: Any,
    make_source: Callable[[Any, Family], Source],
    device: torch.device,
    observer: Observer,
    file_dtype: torch.dtype,
) -> Built:
    """The model that a resolved recipe asks for, on `device` (meta for a plan).

    make_source: from the skeleton and its family to the tensors. file_dtype: of the checkpoint.
    Raises ModelError where the source and the model do not fit each other.
    """
    compute = torch_dtype(recipe.base.compute_dtype)
    with unallocated():
        model, family = skeleton(config, compute)
    source = make_source(model, family)
    held = format_of(recipe, file_dtype)
    sites = find_sites(model, family, config)
    built = Built(model, family, config, sites, {}, held, kernel_on(device, compute))
    if recipe.adapter.method == "lora":
        with unallocated():
            _operate(built, recipe, device)
    load(built, source, device, observer)
    _initialize_adapters(built, device, recipe.train.seed)
    if recipe.train.activation_checkpointing:
        surgery.checkpoint_blocks(model, preserve_random_state=recipe.adapter.dropout > 0)
    model.config.use_cache = False
    return built


def kernel_on(device: torch.device, compute: torch.dtype) -> attention.Kernel:
    """Of attention, on a device that is there."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return attention.kernel_for(device.type, capability, compute)


def _operate(built: Built, recipe: Recipe, device: torch.device) -> None:
    adapter = recipe.adapter
    settings = Settings(
        adapter.rank, adapter.alpha, adapter.dropout, torch_dtype(adapter.dtype), adapter.rslora
    )
    family = built.family
    built.adapted = surgery.parts_to_adapt(built.sites, adapter.targets)
    built.model.requires_grad_(False)
    surgery.install(built.model, built.sites, built.held, built.adapted, settings)
    surgery.install_tables(built.model, family.embeddings, family.head, built.held)
    # A tied table is the head, too, which multiplies by all of it at each step.
    if has_own_memory(device) and not is_tied(built):
        surgery.keep_on_host(built.model, family.token_embedding, device)
    surgery.install_norms(built.model, norm_paths(built.model, family))
    if family.mlp is not None:
        activation = getattr(built.config, family.mlp.activation)
        paths = mlp_paths(built.model, family.blocks, family.mlp)
        surgery.install_mlps(built.model, paths, family.mlp.projections, activation)


def _initialize_adapters(built: Built, device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with scope("adapter"):
        for path, layer in adapted_layers(built.model):
            with within(path):
                layer.initialize(device, generator)


def load(built: Built, source: Source, device: torch.device, observer: Observer) -> None:
    """Fills every place of the model from the source. Raises ModelError for what does not fit."""
    empty = dict(places(built, device))
    names = source.names()
    check_names(built, names, empty)
    observer.stage("load", len(names))
    for done, name in enumerate(names):
        place = empty.pop(name, None)
        if place is not None:
            check_shape(name, source.shape(name), place.shape)
            with scope("temporary"), within(name):
                _fill(place, source, name, device)
        observer.advance(done + 1)
    if is_tied(built):
        _tie(built, source)
    rebuild_buffers(built, device)


@dataclass(frozen=True)
class Place:
    """Where one tensor of the checkpoint goes. shape: as in the file. on_host: it stays there."""

    shape: tuple[int, ...]
    put: Callable[[Tensor], None]
    on_host: bool = False


def places(built: Built, device: torch.device) -> Iterator[tuple[str, Place]]:
    """Name -> place, of every tensor that a checkpoint of this model holds.

    The name leads to the module that needs the tensor: `<path>.weight` to the one at `path`.
    """
    turned = {site.path for site in built.sites if site.transposed}
    tied = is_tied(built)
    for path, module in built.model.named_modules():
        if isinstance(module, QuantLinear):
            name = path.removesuffix(".base")
            if not (tied and name == built.family.head):
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
            category = _category(built, path)
            if not (tied and path == built.family.head):
                yield f"{path}.{key}", _plain_place(module, key, category, device, parameter.dtype)


def _packed_place(module: QuantLinear, transposed: bool) -> Place:
    shape = (module.out_features, module.in_features)

    def put(tensor: Tensor) -> None:
        module.pack(tensor.t() if transposed else tensor)

    return Place(shape[::-1] if transposed else shape, put)


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

    return Place(tuple(old.shape), put)


def _category(built: Built, path: str) -> str:
    if path in built.family.embeddings:
        return "embeddings"
    return "head" if path == built.family.head else "base"


def is_tied(built: Built) -> bool:
    """Whether table and head are one parameter."""
    return bool(getattr(built.config, "tie_word_embeddings", False))


def _fill(place: Place, source: Source, name: str, device: torch.device) -> None:
    with host_memory():
        tensor = source.read(name)
        if place.on_host:
            place.put(tensor)
            return
    place.put(upload(tensor, device))


def check_names(built: Built, names: Any, places: Mapping[str, Place]) -> None:
    """Raises ModelError where a checkpoint's names are not those of the places."""
    present = set(names)
    missing = sorted(set(places) - present)
    allowed = {f"{built.family.head}.weight"} if is_tied(built) else set()
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


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises ModelError where they differ."""
    if tuple(found) != tuple(wanted):
        raise ModelError(
            f"{name} is {tuple(found)} in the checkpoint and {tuple(wanted)} by its config",
            where="model.name",
        )


def _tie(built: Built, source: Source) -> None:
    """One parameter for table and head. A copy of the head in the checkpoint must be a copy."""
    table: Any = built.model.get_submodule(built.family.token_embedding).weight
    built.head.weight = table
    name = f"{built.family.head}.weight"
    if name not in source.names() or table.is_meta:
        return
    if not torch.equal(source.read(name).to(table), table):
        raise ModelError(
            f"config.json ties {name} to the embedding, and the checkpoint has other values for it",
            where="model.name",
            hint='write "tie_word_embeddings": false into config.json if the head is its own',
        )


def rebuild_buffers(built: Built, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are computed by their constructor."""
    for path, module in list(built.model.named_modules()):
        if device.type != "meta" and any(b.is_meta for b in module.buffers(recurse=False)):
            surgery.replace(built.model, path, type(module)(built.config).to(device))
    attribute(built.model.buffers(), "base")
