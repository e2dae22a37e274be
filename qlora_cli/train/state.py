"""Everything a step needs, made the same way for the job and for its plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qlora_cli.files.dtype import torch_dtype
from qlora_cli.memory.tracker import StorageTracker
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.optimizer import LossScale, make_optimizer


@dataclass
class State:
    """A job between two steps. step: optimizer steps done."""

    recipe: Recipe
    loaded: LoadedModel
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    device: torch.device
    step: int = 0


def build_state(request: ModelRequest) -> State:
    """Build the requested model and its optimizer: the state before the first step.

    Raises ModelError if the base does not fit its config, RecipeError if the device lacks something
    that the recipe requires.
    """
    recipe, device = request.recipe, request.device
    loaded = build(request)
    loaded.model.train()
    trainable = loaded.trainable()
    optimizer = make_optimizer(recipe.train, trainable.values(), device)
    half = {torch.float16} & {loaded.weight_format.compute, torch_dtype(recipe.adapter.dtype)}
    return State(recipe, loaded, trainable, optimizer, LossScale(needed=bool(half)), device)


def tag_living(state: State, tracker: StorageTracker) -> None:
    """Counts what the state holds, each tensor under its category."""
    loaded = state.loaded
    for path, module in loaded.model.named_modules():
        if path in loaded.family.embeddings:
            tracker.tag(module.parameters(recurse=False), "embeddings")
        elif path == loaded.family.head:
            if (
                module.weight
                is not loaded.model.get_submodule(loaded.family.token_embedding).weight
            ):
                tracker.tag(module.parameters(recurse=False), "head")
        elif isinstance(module, QuantLinear):
            tracker.tag((p for p in (module.weight, module.bias) if p is not None), "base")
            tracker.tag(module.constants(), "quant_constants")
        else:
            frozen = (p for p in module.parameters(recurse=False) if not p.requires_grad)
            tracker.tag(frozen, "base")
        tracker.tag(module.buffers(recurse=False), "base")
    tracker.tag(state.trainable.values(), "adapter")
