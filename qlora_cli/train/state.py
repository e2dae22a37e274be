"""Everything a step needs, made the same way for the job and for its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_cli.events import Observer
from qlora_cli.families.spec import Family
from qlora_cli.memory.tracker import StorageTracker
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.optimizer import LossScale, make_optimizer
from qlora_cli.weights.build import build, torch_dtype
from qlora_cli.weights.built import Built
from qlora_cli.weights.source import Source


@dataclass
class State:
    """A job between two steps. step: optimizer steps done."""

    recipe: Recipe
    built: Built
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    device: torch.device
    step: int = 0


def build_state(
    recipe: Recipe,
    config: Any,
    make_source: Callable[[Any, Family], Source],
    device: torch.device,
    observer: Observer,
    file_dtype: torch.dtype,
) -> State:
    """From a resolved recipe to a state before its first step.

    Raises ModelError for a base that does not fit its config, RecipeError for what the device
    lacks.
    """
    built = build(recipe, config, make_source, device, observer, file_dtype)
    built.model.train()
    trainable = built.trainable()
    optimizer = make_optimizer(recipe.train, trainable.values(), device)
    half = {torch.float16} & {built.held.compute, torch_dtype(recipe.adapter.dtype)}
    return State(recipe, built, trainable, optimizer, LossScale(needed=bool(half)), device)


def tag_living(state: State, tracker: StorageTracker) -> None:
    """Counts what the state holds, each tensor under its category."""
    built = state.built
    for path, module in built.model.named_modules():
        if path in built.family.embeddings:
            tracker.tag(module.parameters(recurse=False), "embeddings")
        elif path == built.family.head:
            if module.weight is not built.model.get_submodule(built.family.token_embedding).weight:
                tracker.tag(module.parameters(recurse=False), "head")
        elif isinstance(module, QuantLinear):
            tracker.tag((p for p in (module.weight, module.bias) if p is not None), "base")
            tracker.tag(module.constants(), "quant_constants")
        else:
            frozen = (p for p in module.parameters(recurse=False) if not p.requires_grad)
            tracker.tag(frozen, "base")
        tracker.tag(module.buffers(recurse=False), "base")
    tracker.tag(state.trainable.values(), "adapter")
