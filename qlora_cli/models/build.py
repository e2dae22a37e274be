"""The base, streamed: one tensor at a time from its source, quantized as it arrives.

The model is made on meta, gets its packed linears and adapters there (`nn/surgery.py`), and then
each tensor of the source goes to its place. No full-precision copy of the model ever exists: at
any moment there is what is already packed, and one tensor. The plan calls the same function with
an imagined source.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.lora import LoraSettings, adapted_layers
from qlora_cli.device import DeviceProfile
from qlora_cli.events import Observer, Silent
from qlora_cli.files.dtype import file_dtype, torch_dtype
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import module_scope, scope, unallocated
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

MakeSource = Callable[[Any, Family], TensorSource]
"""From transformers' model on meta and its family to the tensors of a checkpoint."""


def _causal_lm() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


@dataclass(frozen=True)
class ModelRequest:
    """Everything that `build` needs to build a model.

    recipe: resolved, without `auto`. config: transformers' config of the base; it is not modified.
    make_source: opens the checkpoint. device: device of the model's tensors, meta in a dry run.
    profile: facts about the device that the model runs on or is planned for. model_class: the
    transformers Auto class of the task. file_dtype: dtype of the checkpoint, read from the config.
    """

    recipe: Recipe
    config: Any
    make_source: MakeSource
    device: torch.device
    profile: DeviceProfile
    observer: Observer = field(default_factory=Silent)
    model_class: Any = field(default_factory=_causal_lm)
    file_dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "file_dtype", file_dtype(self.config))


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


def skeleton(
    config: Any, compute: torch.dtype, model_class: Any | None = None
) -> tuple[Any, Family]:
    """Return (transformers' model on meta, its family).

    config: not modified; the model has a copy of it. compute: dtype of the parameters.
    model_class: a transformers Auto class, for causal language models if not given. Raises
    ModelError for an unknown family.
    """
    model_class = model_class or _causal_lm()
    if not is_known(config):
        family_of(config, _linears_of_a_block(config, model_class))
    family = family_of(config)
    # transformers writes the dtype and the attention's name into the config that it is given.
    config = deepcopy(config)
    # The base's own dropout is off: the adapter has its own, and dropped activations are kept.
    for key in family.dropouts:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    with torch.device("meta"):
        model = model_class.from_config(
            config,
            attn_implementation=attention.NAME,
            dtype=compute,
            trust_remote_code=False,
        )
    # Batches have no padding; told of a pad token, GPT-2 would look for it in every batch.
    model.config.pad_token_id = None
    return model, family


def _linears_of_a_block(config: Any, model_class: Any) -> list[str]:
    """Paths within the first block of a model of any family, for the error about an unknown one."""
    try:
        with torch.device("meta"):
            model = model_class.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, ImportError):  # Not a causal model, or one that needs more.
        return []
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = next((blocks for blocks in lists if len(blocks)), None)
    return convert.linear_paths(blocks[0]) if blocks is not None else []


def build(request: ModelRequest) -> LoadedModel:
    """Build the requested model and fill it from its source.

    Returns a model with packed linears and initialized adapters on `request.device`. Raises
    ModelError if the family is unknown or the source does not fit the config.
    """
    recipe, device = request.recipe, request.device
    weight_format = weight_format_of(recipe, request.file_dtype)
    with unallocated():
        model, family = skeleton(request.config, weight_format.compute, request.model_class)
    source = request.make_source(model, family)
    sites = find_sites(model, family, model.config)
    kernel = attention.kernel_for(request.profile, weight_format.compute)
    loaded = LoadedModel(model, family, model.config, sites, {}, weight_format, kernel)
    if recipe.adapter.method == "lora":
        with unallocated():
            _operate(loaded, recipe, device)
    load(loaded, source, device, request.observer)
    _initialize_adapters(loaded, device, recipe.train.seed)
    if recipe.train.activation_checkpointing:
        convert.checkpoint_blocks(model, preserve_random_state=recipe.adapter.dropout > 0)
    model.config.use_cache = False
    return loaded


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
