"""The state of a training job, built by the same function for the job and for its dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlora_cli.adapters.registry import method_of
from qlora_cli.errors import Problem, RecipeError
from qlora_cli.files.dtype import torch_dtype
from qlora_cli.memory.tracker import StorageTracker
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.block_shards import BlockShards
from qlora_cli.nn.embedding import HostEmbedding
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.parallel.processes import SINGLE, Processes
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of
from qlora_cli.tasks.task import Task
from qlora_cli.train.divided_optimizer import DividedOptimizer, make_divided_optimizer
from qlora_cli.train.division import Division
from qlora_cli.train.loss_scale import LossScale
from qlora_cli.train.optimizer import OPTIMIZERS, TrainingOptimizer

BuildModel = Callable[[ModelRequest], LoadedModel]
"""Builds the requested model, as `models.build.build` does."""


@dataclass
class State:
    """A training job between two optimizer steps.

    recipe: resolved, without `auto`. task: the recipe's training objective. trainable: name ->
    parameter that the optimizer updates. step: number of optimizer steps done. processes: those
    that train the job, each with a state of its own; all parameters are equal after a step.
    division: of the trained parameters over the processes. If the base is sharded, a parameter
    has its values while its block runs, or in `division.completed`; pieces have them always.
    """

    recipe: Recipe
    task: Task
    loaded: LoadedModel
    trainable: dict[str, nn.Parameter]
    division: Division
    optimizer: TrainingOptimizer
    loss_scale: LossScale
    device: torch.device
    step: int = 0
    processes: Processes = SINGLE

    @property
    def has_optimizer_states(self) -> bool:
        """Whether the optimizer has updated parameters; equal in all processes."""
        if isinstance(self.optimizer, DividedOptimizer):
            return self.optimizer.has_states
        return bool(self.optimizer.state)


def build_state(request: ModelRequest, build_model: BuildModel = build) -> State:
    """Build the requested model and its optimizer: the state before the first step.

    The recipe's task selects the model class. build_model: builds the model; the default loads the
    base. Raises ModelError if the base does not fit its
    config, RecipeError if the task is not implemented or the device lacks something that the recipe
    requires.
    """
    recipe, device = request.recipe, request.device
    task = task_of(recipe)
    loaded = build_model(replace(request, model_class=task.model_class))
    loaded.model.train()
    trainable = loaded.trainable()
    unit = OPTIMIZERS[recipe.train.optimizer].unit
    division = _division(loaded, trainable, unit, request.processes)
    factors = method_of(recipe.adapter).lr_factors(loaded.model)
    optimizer = make_divided_optimizer(recipe.train, division, device, factors)
    half = {torch.float16} & {loaded.base_format.compute, torch_dtype(recipe.adapter.dtype)}
    if half and recipe.train.update_in_backward:
        raise RecipeError(
            "float16 cannot be trained with a setting of the recipe",
            [
                Problem(
                    "train.update_in_backward",
                    "a step whose float16 gradients overflow is skipped, and is not known before "
                    "all gradients exist",
                    "set it to false, or base.compute_dtype and adapter.dtype to another dtype",
                )
            ],
        )
    scale = LossScale(needed=bool(half))
    given = (recipe, task, loaded, trainable, division, optimizer, scale, device)
    return State(*given, processes=request.processes)


def _division(
    loaded: LoadedModel, trainable: dict[str, nn.Parameter], unit: int, processes: Processes
) -> Division:
    """Return the division of the parameters, which are sharded if the base is."""
    blocks, stream = loaded.family.blocks, loaded.stream
    if not isinstance(stream, BlockShards):
        return Division(trainable, blocks, unit, processes)
    division = Division(trainable, blocks, unit, processes, stream.num_blocks)
    stream.trained = division.sharded
    return division


def tag_living(state: State, tracker: StorageTracker) -> None:
    """Register every tensor of the state with `tracker`, each under its memory category."""
    loaded = state.loaded
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    for path, module in loaded.model.named_modules():
        if isinstance(module, HostEmbedding | HostHead) and not module.is_on_disk:
            tracker.tag([module.weight], "embeddings" if module.weight is table.weight else "head")
        if path in loaded.family.embeddings:
            tracker.tag(module.parameters(recurse=False), "embeddings")
        elif path == loaded.family.head and not loaded.family.is_classifier:
            # A tied head is the embedding, which has its own category.
            if module.weight is not table.weight:
                tracker.tag(module.parameters(recurse=False), "head")
        elif isinstance(module, QuantLinear):
            # The weights of a block that is streamed are on the device only while it computes.
            if module.weight.numel():
                tracker.tag([module.weight], "base")
                tracker.tag(module.constants(), "quant_constants")
            if module.bias is not None:
                tracker.tag([module.bias], "base")
        else:
            frozen = (p for p in module.parameters(recurse=False) if not p.requires_grad)
            tracker.tag(frozen, "base")
        tracker.tag(module.buffers(recurse=False), "base")
    tracker.tag(state.trainable.values(), "adapter")


def tag_optimizer(state: State, tracker: StorageTracker) -> None:
    """Register the optimizer's states with `tracker`, which has not met those of a checkpoint."""
    values = tree_leaves([dict(own) for own in state.optimizer.state.values()])
    tracker.tag((value for value in values if isinstance(value, Tensor)), "optimizer")
