"""The plan: the real job on imagined tensors.

`build_state` and `train_step` as the job calls them, on `meta`, with the memory tracker around
them. Only the source of weights and the batch differ. Why meta and not FakeTensorMode: the latter
cannot build packed weights and makes transformers build a mask; meta is also three times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_cli.data.collate import Batch
from qlora_cli.events import Silent
from qlora_cli.families.spec import Family
from qlora_cli.memory.instrument import CUDA_GRANULARITY
from qlora_cli.memory.ledger import Phase, Side, Source, worst
from qlora_cli.memory.rules import CPU_RULES
from qlora_cli.memory.tracker import StorageTracker, gradients_of
from qlora_cli.nn.attention import FLASH_CAPABILITY, FLASH_DTYPES
from qlora_cli.recipe.resolve import DeviceFacts
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.forward import evaluate
from qlora_cli.train.optimizer import learning_rate
from qlora_cli.train.state import State, build_state, tag_living
from qlora_cli.train.step import train_step
from qlora_cli.weights.source import ImaginedSource


@dataclass(frozen=True)
class Imagined:
    """What a plan found. adapter_bytes: of the trained tensors, as a checkpoint holds them."""

    phases: tuple[Phase, ...]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The worst instant of the job."""
        return worst(self.phases).peak_bytes


def imagine(
    recipe: Recipe,
    config: Any,
    facts: DeviceFacts,
    window: Sequence[Batch],
    held_out: Sequence[Batch] = (),
) -> Imagined:
    """Load, first step, later step and evaluation of a resolved recipe on the device of `facts`.

    window: the worst micro-batches of one optimizer step, on the host; the second and later ones
    matter because gradients are alive then, so two stand for any number. Raises as the job would.
    """
    on_card = facts.kind == "cuda"
    tracker = StorageTracker(
        rules={} if on_card else CPU_RULES,
        granularity=CUDA_GRANULARITY if on_card else 1,
        counts_host=not on_card,
        device_type="meta",
    )
    with tracker:
        with tracker.phase("load"):
            state, total_parameters = _build(recipe, config)
            tag_living(state, tracker)
        state.built.flash = _has_flash(facts, state)
        _steps(state, tracker, window[:2])
        if held_out:
            with tracker.phase("eval"):
                evaluate(state.built, held_out[:1], state.device)
    return Imagined(
        phases=tracker.phases,
        trainable_parameters=sum(p.numel() for p in state.trainable.values()),
        total_parameters=total_parameters,
        adapter_bytes=sum(p.numel() * p.element_size() for p in state.trainable.values()),
    )


def side(recipe: Recipe, phases: tuple[Phase, ...], source: Source) -> Side:
    """One side of before and after."""
    peak = worst(phases)
    return Side(recipe.adapter.method, source, peak.peak_bytes, peak.at_peak, recipe.base.bits)


def full_fine_tuning(recipe: Recipe) -> Recipe:
    """The same job with every weight trained, which the adapter's saving is measured against."""
    return recipe.model_copy(
        update={
            "adapter": type(recipe.adapter)(method="full"),
            "base": recipe.base.model_copy(update={"bits": 16}),
            "train": recipe.train.model_copy(update={"optimizer": "adamw"}),
        }
    )


def _build(recipe: Recipe, config: Any) -> tuple[State, int]:
    """(the state before its first step, parameters of the base as its config makes it)."""
    total_parameters = 0

    def source(model: nn.Module, family: Family) -> ImaginedSource:
        nonlocal total_parameters
        total_parameters = sum(parameter.numel() for parameter in model.parameters())
        # No plan knows the order of a file. The worst is taken: the blocks' linears, which are
        # packed, come when all else is there, and the largest comes last.
        tensors = dict(
            sorted(
                model.named_parameters(),
                key=lambda item: (item[0].startswith(family.blocks), item[1].numel()),
            )
        )
        if getattr(config, "tie_word_embeddings", False):
            tensors.pop(f"{family.head}.weight", None)
        return ImaginedSource(tensors, file_dtype)

    file_dtype = getattr(config, "dtype", None) or torch.float16
    meta = torch.device("meta")
    state = build_state(recipe, deepcopy(config), source, meta, Silent(), file_dtype)
    return state, total_parameters


def _steps(state: State, tracker: StorageTracker, window: Sequence[Batch]) -> None:
    with gradients_of(state.trainable.values(), tracker):
        for step, name in enumerate(("first_step", "step")):
            with tracker.phase(name):
                train_step(state, window, learning_rate(state.recipe.train, step, 2))


def _has_flash(facts: DeviceFacts, state: State) -> bool:
    capable = facts.capability is not None and facts.capability >= FLASH_CAPABILITY
    return capable and state.built.held.compute in FLASH_DTYPES
