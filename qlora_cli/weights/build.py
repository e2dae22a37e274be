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

from qlora_cli.events import Observer
from qlora_cli.families.registry import family_of, is_known
from qlora_cli.families.sites import find_sites, mlp_paths, norm_paths
from qlora_cli.families.spec import Family
from qlora_cli.memory.tracker import scope, unallocated, within
from qlora_cli.nn import attention, surgery
from qlora_cli.nn.embedding import has_own_memory
from qlora_cli.nn.lora import Settings, adapted_layers
from qlora_cli.nn.quant import Format
from qlora_cli.recipe.schema import Recipe
from qlora_cli.weights.built import Built, is_tied
from qlora_cli.weights.load import load
from qlora_cli.weights.source import Source


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


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
