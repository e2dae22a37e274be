"""Builds a model from a recipe and a checkpoint.

The model is created on meta. There it gets packed linears and adapters (`convert.py`). Then
`placement/` reads one tensor at a time and quantizes it. No full-precision copy of the model ever
exists: at any moment memory contains the packed weights and one tensor of the checkpoint. A dry run
calls the same function with a source of meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from qlora_cli.adapters.peft_file import AdapterFile
from qlora_cli.adapters.registry import method_of
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import ModelError, Problem, RecipeError
from qlora_cli.events import Observer, Silent
from qlora_cli.files.atomic import PARSE_ERRORS
from qlora_cli.files.composed import text_config_of, whole_config
from qlora_cli.files.dtype import file_dtype, torch_dtype
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import unallocated
from qlora_cli.models.base_format import base_format_of
from qlora_cli.models.classifier import (
    ClassifierClass,
    check_classifier,
    classifier_family,
    is_classifier_class,
)
from qlora_cli.models.composed import auto_class, remove_other_parts
from qlora_cli.models.coverage import check_logits
from qlora_cli.models.depth import num_blocks
from qlora_cli.models.derive import derive_family, dropout_keys
from qlora_cli.models.family import Family
from qlora_cli.models.importance import check_importance
from qlora_cli.models.initial_factors import InitialFactors
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.block_shards import ShardedPlacement
from qlora_cli.models.placement.device import DevicePlacement
from qlora_cli.models.placement.disk import DiskPlacement
from qlora_cli.models.placement.held import PackedCopy
from qlora_cli.models.placement.placement import Placement
from qlora_cli.models.prefix import create_prefix, prefix_parameters
from qlora_cli.models.registry import known_family, refuse_by_name, unsupported
from qlora_cli.models.replacement import replace_modules
from qlora_cli.models.sites import find_sites, find_stacks, mixer_paths
from qlora_cli.nn import attention
from qlora_cli.nn.activation_policy import ActivationPolicy, Recomputation
from qlora_cli.nn.by_row import restart_positions, run_by_row
from qlora_cli.nn.input_offload import InputOffload
from qlora_cli.parallel.processes import SINGLE, Processes
from qlora_cli.recipe.activations import recomputed_blocks
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.schema import Recipe

MakeSource = Callable[[Any, Family], TensorSource]
"""From transformers' model on meta and its family to the tensors of a checkpoint."""


_MAX_REASON = 1000
"""Characters of transformers' reason why it cannot create a model."""


def _causal_lm() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


@dataclass(frozen=True)
class ModelRequest:
    """Everything that `build` needs to build a model.

    recipe: resolved, without `auto`. config: transformers' config of the base; it is not modified.
    make_source: opens the checkpoint. device: device of the model's tensors, meta in a dry run.
    profile: facts about the device that the model runs on or is planned for. model_class: the
    transformers Auto class of the task. copy: of the packed base; None if none is kept. processes:
    those that train the job, over which the base may be sharded. adapter: has the factors that its
    training began with (`adapter.init`); None to compute them.
    file_dtype: dtype of the checkpoint, read from the config.
    """

    recipe: Recipe
    config: Any
    make_source: MakeSource
    device: torch.device
    profile: DeviceProfile
    observer: Observer = field(default_factory=Silent)
    model_class: Any = field(default_factory=_causal_lm)
    copy: PackedCopy | None = None
    processes: Processes = SINGLE
    adapter: AdapterFile | None = None
    file_dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "file_dtype", file_dtype(self.config))


def skeleton(
    config: Any, compute: torch.dtype, model_class: Any | None = None
) -> tuple[Any, Family]:
    """Return (transformers' model on meta, its family).

    config: not modified; the model has a copy of it. compute: dtype of the parameters.
    model_class: a transformers Auto class, for causal language models if not given. Raises
    ModelError if transformers cannot create the model or no family can describe it.
    """
    refuse_by_name(config)
    family = known_family(config)
    if family is not None and model_class in (None, _causal_lm()):
        check_logits(config)
    # transformers writes the dtype and the attention's name into the config that it is given.
    config = deepcopy(config)
    # The base's own dropout is disabled: the adapter has its own, and dropout saves activations.
    for key in family.dropouts if family else dropout_keys(config):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    model_class = model_class or _causal_lm()
    if isinstance(model_class, ClassifierClass):
        check_classifier(config)
    model_class = auto_class(config, model_class)
    model = _create(whole_config(config), compute, model_class)
    # Batches have no padding. With a pad token set, GPT-2 would search for it in every batch.
    with suppress(StrictDataclassError):  # Some configs require a pad token.
        text_config_of(model).pad_token_id = None
    if is_classifier_class(model):
        family = classifier_family(model, family)
        for path in family.classifier.modules:
            model.get_submodule(path).float()
    family = family or derive_family(model)
    remove_other_parts(model, family.others)
    for path in mixer_paths(model, family):
        run_by_row(model.get_submodule(path))
    for path in family.rows.counting_tables:
        restart_positions(model.get_submodule(path))
    return model, family


def _create(config: Any, compute: torch.dtype, model_class: Any) -> Any:
    """Return transformers' model on meta, with this package's attention if the class allows it.

    Raises ModelError if transformers cannot create it.
    """
    try:
        try:
            model = _from_config(config, compute, model_class, attention.NAME)
        except KeyError:  # A class with a table of its own attention modules.
            return _from_config(config, compute, model_class, "eager")
        if type(model)._can_set_attn_implementation():
            return model
        return _from_config(config, compute, model_class, "eager")
    except (*PARSE_ERRORS, ImportError, RuntimeError) as fault:  # Sizes that overflow.
        text = str(fault) if isinstance(fault, ValueError) else repr(fault)
        reason = text.strip().splitlines()[0][:_MAX_REASON]
        raise unsupported(config, f"transformers cannot create it: {reason}") from fault


def _from_config(config: Any, compute: torch.dtype, model_class: Any, name: str) -> Any:
    """Return transformers' model on meta. name: of the attention."""
    with torch.device("meta"):
        return model_class.from_config(
            config, attn_implementation=name, dtype=compute, trust_remote_code=False
        )


def build(request: ModelRequest) -> LoadedModel:
    """Build the requested model and load its weights from the source.

    Returns a model with packed linears and initialized adapters on `request.device`. Raises
    ModelError if the family is unknown or the source does not fit the config, RecipeError if a
    pattern of `base.overrides` matches no linear.
    """
    recipe, device = request.recipe, request.device
    method = method_of(recipe.adapter)
    base_format = base_format_of(recipe, request.file_dtype)
    with unallocated():
        model, family = skeleton(request.config, base_format.compute, request.model_class)
    source = request.make_source(model, family)
    config = text_config_of(model)
    sites = find_sites(model, family, config)
    base_format.check([*sites, *find_stacks(model, family)])
    if base_format.importance:
        check_importance(base_format.importance, sites)
    kernel = attention.kernel_for(request.profile, base_format.compute)
    loaded = LoadedModel(model, family, config, sites, {}, base_format, kernel)
    if method.freezes_base:
        with unallocated():
            replace_modules(loaded, recipe, device)
    copy = request.copy if method.freezes_base else None
    num_streamed = streamed_blocks(loaded, recipe)
    initial = InitialFactors.of(loaded, recipe, device, request.adapter)
    base = source if initial is None else initial.source(source)
    _placement(request, copy, num_streamed).place(loaded, base)
    initialize_adapter(loaded, request, source, initial)
    blocks: Any = model.get_submodule(family.blocks)
    policy = ActivationPolicy.recompute_first(0, len(blocks))
    loaded.recomputation = Recomputation(blocks, policy)
    apply_train_settings(loaded, recipe)
    config.use_cache = False
    return loaded


def _placement(request: ModelRequest, copy: PackedCopy | None, num_streamed: int) -> Placement:
    """Return the placement that the recipe names. num_streamed: of `streamed_blocks`.

    One process, as after training, has in host memory what several share.
    """
    device, observer, processes = request.device, request.observer, request.processes
    residency = request.recipe.base.residency
    if residency == "disk":
        assert copy is not None, "base.residency: disk keeps a copy"
        return DiskPlacement(device, copy, num_streamed, observer)
    if residency == SHARD and processes.size > 1 and num_streamed:
        return ShardedPlacement(device, observer, copy, num_streamed, processes)
    return DevicePlacement(device, observer, copy, num_streamed)


def streamed_blocks(loaded: LoadedModel, recipe: Recipe) -> int:
    """Return the number of first blocks whose weights are not on the device all the time.

    They are those that are recomputed. Raises ModelError if blocks of the model share weights.
    """
    if not recipe.base.moves_blocks:
        return 0
    blocks: Any = loaded.model.get_submodule(loaded.family.blocks)
    if len(blocks) != num_blocks(loaded.config) or loaded.family.shared:
        raise ModelError(
            "blocks of this model share weights, so they cannot be streamed",
            where="base.residency",
            hint="set base.residency=device",
        )
    return recomputed_blocks(recipe.train.activation_checkpointing, len(blocks))


def initialize_adapter(
    loaded: LoadedModel,
    request: ModelRequest,
    source: TensorSource,
    initial: InitialFactors | None,
) -> None:
    """Create the parameters of the recipe's adapter method, and freeze all that it does not train.

    The base is loaded, and the linears are wrapped. source: of the base. initial: None if
    B begins as 0.
    """
    recipe, model = request.recipe, loaded.model
    method = method_of(recipe.adapter)
    method.initialize(model, request.device, recipe.train.seed)
    if initial is not None:
        initial.start(source)
    if recipe.adapter.prefix:
        dtype = torch_dtype(recipe.adapter.dtype)
        create_prefix(loaded, recipe.adapter.prefix, dtype, request.device, recipe.train.seed)
    model.requires_grad_(False)
    heads = (model.get_submodule(path).parameters() for path in loaded.family.classifier.modules)
    own = (*method.trained_parameters(model), *prefix_parameters(model))
    for parameter in (*own, *chain.from_iterable(heads)):
        parameter.requires_grad_(True)


def apply_train_settings(loaded: LoadedModel, recipe: Recipe) -> None:
    """Apply the recipe's activation policy and its chunk of the loss to a model.

    Raises RecipeError if the recipe recomputes more blocks than there are, or moves inputs to host
    memory without a GPU.
    """
    if recipe.train.offload_inputs is True and loaded.kernel == "cpu":
        raise RecipeError(
            "this device does not support a setting of the recipe",
            [
                Problem(
                    "train.offload_inputs",
                    "it moves tensors from GPU to CPU memory, and there is no GPU",
                    "omit it",
                )
            ],
        )
    chunk, setting = recipe.train.loss_chunk, recipe.train.activation_checkpointing
    loaded.loss_chunk = None if chunk == "auto" else chunk
    recomputation = loaded.recomputation
    num_modules = len(recomputation.policy.actions)
    # ALBERT computes its only block several times, so it is recomputed always or never.
    number = min(recomputed_blocks(setting, num_blocks(loaded.config)), num_modules)
    recomputation.policy = ActivationPolicy.recompute_first(number, num_modules)
    recomputation.preserves_random_state = recipe.adapter.dropout > 0
    if loaded.stream is not None:
        recomputation.before_block = loaded.stream.acquire
    recomputation.offload = InputOffload() if recipe.train.offload_inputs is True else None
