"""The plan: the real job on imagined tensors.

`build_state` and `train_step` as the job calls them, on `meta`, with the memory tracker around
them. Only the source of weights and the batch differ. Why meta and not FakeTensorMode: the latter
cannot build packed weights and makes transformers build a mask; meta is also three times faster.

A few blocks are imagined and their events repeated for the rest (`memory/recording.py`). What comes
out is played to the account of a CPU, or to a model of the caching allocator of a card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_cli.data.collate import Batch
from qlora_cli.device import DeviceProfile
from qlora_cli.files.dtype import file_dtype
from qlora_cli.memory.gc_pause import gc_paused
from qlora_cli.memory.ledger import FigureSource, MethodPeak, Phase, worst
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.tracker import StorageTracker, track_gradients
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.family import Family
from qlora_cli.nn.quant import forget_codes
from qlora_cli.plan.meta_source import MetaSource
from qlora_cli.plan.recording import NUM_RECORDED_BLOCKS, NotAlike, Recording
from qlora_cli.plan.replay import MemoryPlan, Recorded, account
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.optimizer import learning_rate
from qlora_cli.train.state import State, build_state, tag_living
from qlora_cli.train.step import train_step


def dry_run(
    recipe: Recipe,
    config: Any,
    facts: DeviceProfile,
    window: Sequence[Batch],
    held_out: Sequence[Batch] = (),
) -> MemoryPlan:
    """Load, first step, later step and evaluation of a resolved recipe on the device of `facts`.

    window: of an optimizer step, on the host, the worst first micro-batch and the worst of those
    behind it, where there are some; gradients are alive then, so two stand for any number.
    held_out: the worst of evaluation, none where the job evaluates nothing. Raises as the job does.
    """
    job = _DryRun(recipe, facts, window, held_out)
    # It runs when it likes, and a plan shall say the same each time; it would also look through a
    # hundred thousand events again and again.
    with gc_paused():
        return _imagine(job, config)


def _imagine(job: _DryRun, config: Any) -> MemoryPlan:
    """With few blocks where they are alike, else with all."""
    num_blocks = config.num_hidden_layers
    if _blocks_are_alike(job.recipe, config):
        shorter = deepcopy(config)
        shorter.num_hidden_layers = NUM_RECORDED_BLOCKS
        if getattr(config, "layer_types", None):
            shorter.layer_types = config.layer_types[:NUM_RECORDED_BLOCKS]
        try:
            return account(job.record(shorter), num_blocks)
        except NotAlike:
            pass
    return account(job.record(deepcopy(config)), num_blocks)


def method_peak(recipe: Recipe, phases: tuple[Phase, ...], source: FigureSource) -> MethodPeak:
    """One side of before and after."""
    peak = worst(phases)
    return MethodPeak(
        recipe.adapter.method, source, peak.peak_bytes, peak.at_peak, recipe.base.bits
    )


def _blocks_are_alike(recipe: Recipe, config: Any) -> bool:
    """Whether nothing that is known beforehand sets one block apart from the others."""
    targets = recipe.adapter.targets
    by_role = isinstance(targets, str) or not any("." in target for target in targets)
    kinds = set(getattr(config, "layer_types", None) or ())
    return by_role and len(kinds) <= 1 and config.num_hidden_layers > NUM_RECORDED_BLOCKS


@dataclass(frozen=True)
class _DryRun:
    """What is imagined, whatever the number of blocks."""

    recipe: Recipe
    facts: DeviceProfile
    window: Sequence[Batch]
    held_out: Sequence[Batch]

    def record(self, config: Any) -> Recorded:
        """The whole job with a model of as many blocks as the config says; changes the config."""
        recording = Recording()
        memory_model = MemoryModel.of(self.facts)
        tracker = memory_model.new_tracker(recording, "meta")
        dtype = file_dtype(config)
        meta = torch.device("meta")
        total = (0, 0)

        def source(model: nn.Module, family: Family) -> MetaSource:
            nonlocal total
            recording.blocks = family.blocks
            total = _counted(dict(model.named_parameters()), family, nn.Parameter.numel)
            return MetaSource(model, family, dtype)

        forget_codes(meta)
        with tracker:
            recording.begin_phase()
            state = build_state(ModelRequest(self.recipe, config, source, meta, self.facts))
            tag_living(state, tracker)
            recording.end_phase("load")
            recording.release_cache()
            self._go(state, tracker, recording)
        family = state.loaded.family
        tokens = max(batch.num_tokens for batch in self.window)
        return Recorded(
            recording.visits,
            config.num_hidden_layers,
            memory_model,
            total,
            _counted(state.trainable, family, nn.Parameter.numel),
            _counted(state.trainable, family, lambda p: p.numel() * p.element_size()),
            tokens * config.hidden_size * state.loaded.weight_format.compute.itemsize,
        )

    def _go(self, state: State, tracker: StorageTracker, recording: Recording) -> None:
        loaded = state.loaded
        _announce_blocks(loaded.model.get_submodule(loaded.family.blocks), recording)
        with track_gradients(state.trainable.values(), tracker):
            for step, name in enumerate(("first_step", "step")):
                recording.begin_phase()
                train_step(state, self.window, learning_rate(self.recipe.train, step, 2))
                recording.end_phase(name)
        # Saving reads what lives and writes it to a file; it makes nothing on the device.
        recording.begin_phase()
        recording.end_phase("checkpoint")
        if self.held_out:
            recording.begin_phase()
            state.task.evaluate(loaded, self.held_out, state.device)
            recording.end_phase("eval")


def _counted(
    parameters: dict[str, nn.Parameter], family: Family, size: Callable[[nn.Parameter], int]
) -> tuple[int, int]:
    """(sum over all, sum over one block in the middle)."""
    middle = f"{family.blocks}.{NUM_RECORDED_BLOCKS // 2}."
    of_block = sum(size(p) for name, p in parameters.items() if name.startswith(middle))
    return sum(map(size, parameters.values())), of_block


def _announce_blocks(blocks: Any, recording: Recording) -> None:
    """Tells the recording which block is at work, forward and backward."""
    for index, block in enumerate(blocks):
        block.forward = _announced(block.forward, f"{recording.blocks}.{index}", recording)


def _announced(forward: Callable[..., Any], path: str, recording: Recording) -> Callable[..., Any]:
    def announced(*args: Any, **kwargs: Any) -> Any:
        # It stays at work until the next one, and lets go of what the one before it made.
        recording.enter_module(path)
        output = forward(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: recording.enter_module(path))
        return output

    return announced
