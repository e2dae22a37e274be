"""The base, streamed: one tensor at a time from its source, quantized as it arrives.

The model is made on meta, gets its packed linears and adapters there (`nn/surgery.py`), and then
each tensor of the source goes to its place. No full-precision copy of the model ever exists: at
any moment there is what is already packed, and one tensor. The plan calls the same function with
an imagined source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.lora import LoraSettings, adapted_layers
from qlora_cli.events import Observer
from qlora_cli.files.dtype import torch_dtype
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.tracker import module_scope, scope, unallocated
from qlora_cli.models import convert
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel, is_tied
from qlora_cli.models.placement.device import load
from qlora_cli.models.registry import family_of, is_known
from qlora_cli.models.sites import find_sites, mlp_paths, norm_paths
from qlora_cli.nn import attention
from qlora_cli.nn.embedding import has_own_memory
from qlora_cli.nn.quant import WeightFormat
from qlora_cli.recipe.schema import Recipe


def storage_dtype(file: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """Of weights that are not packed: 16 bit always, the file's own where it is 16 bit.

    A 16-bit compute dtype decides, because a product needs both sides in it.
    """
    if compute.itemsize == 2:
        return compute
    return file if file.itemsize == 2 else torch.float16


def weight_format_of(recipe: Recipe, file_dtype: torch.dtype) -> WeightFormat:
    """How a resolved recipe holds a base whose files are in `file_dtype`."""
    compute = torch_dtype(recipe.base.compute_dtype)
    return WeightFormat(
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
            config,
            attn_implementation=attention.NAME,
            dtype=compute,
            trust_remote_code=False,
        )
    # Batches have no padding; told of a pad token, GPT-2 would look for it in every batch.
    model.config.pad_token_id = None
    return model, family


def _linears_of_a_block(config: Any) -> list[str]:
    """Paths within the first block of a model of any family, for the error about an unknown one."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, ImportError):  # Not a causal model, or one that needs more.
        return []
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = next((blocks for blocks in lists if len(blocks)), None)
    return convert.linear_paths(blocks[0]) if blocks is not None else []


def build(
    recipe: Recipe,
    config: Any,
    make_source: Callable[[Any, Family], TensorSource],
    device: torch.device,
    observer: Observer,
    file_dtype: torch.dtype,
) -> LoadedModel:
    """The model that a resolved recipe asks for, on `device` (meta for a plan).

    make_source: from the skeleton and its family to the tensors. file_dtype: of the checkpoint.
    Raises ModelError where the source and the model do not fit each other.
    """
    compute = torch_dtype(recipe.base.compute_dtype)
    with unallocated():
        model, family = skeleton(config, compute)
    source = make_source(model, family)
    weight_format = weight_format_of(recipe, file_dtype)
    sites = find_sites(model, family, config)
    loaded = LoadedModel(
        model, family, config, sites, {}, weight_format, kernel_on(device, compute)
    )
    if recipe.adapter.method == "lora":
        with unallocated():
            _operate(loaded, recipe, device)
    load(loaded, source, device, observer)
    _initialize_adapters(loaded, device, recipe.train.seed)
    if recipe.train.activation_checkpointing:
        convert.checkpoint_blocks(model, preserve_random_state=recipe.adapter.dropout > 0)
    model.config.use_cache = False
    return loaded


def kernel_on(device: torch.device, compute: torch.dtype) -> attention.Kernel:
    """Of attention, on a device that is there."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return attention.kernel_for(device.type, capability, compute)


def _operate(loaded: LoadedModel, recipe: Recipe, device: torch.device) -> None:
    adapter = recipe.adapter
    settings = LoraSettings(
        adapter.rank, adapter.alpha, adapter.dropout, torch_dtype(adapter.dtype), adapter.rslora
    )
    family = loaded.family
    loaded.adapted = convert.adapted_roles(loaded.sites, adapter.targets)
    loaded.model.requires_grad_(False)
    convert.install(loaded.model, loaded.sites, loaded.weight_format, loaded.adapted, settings)
    convert.install_tables(loaded.model, family.embeddings, family.head, loaded.weight_format)
    # A tied table is the head, too, which multiplies by all of it at each step.
    if has_own_memory(device) and not is_tied(loaded):
        convert.keep_on_host(loaded.model, family.token_embedding, device)
    convert.install_norms(loaded.model, norm_paths(loaded.model, family))
    if family.mlp is not None:
        activation = getattr(loaded.config, family.mlp.activation)
        paths = mlp_paths(loaded.model, family.blocks, family.mlp)
        convert.install_mlps(loaded.model, paths, family.mlp.projections, activation)


def _initialize_adapters(loaded: LoadedModel, device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with scope("adapter"):
        for path, layer in adapted_layers(loaded.model):
            with module_scope(path):
                layer.initialize(device, generator)
