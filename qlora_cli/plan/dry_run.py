"""Plans a job's memory by running the job itself on meta tensors.

The dry run calls the same `build_state` and `train_step` as the job, with the storage tracker
around them. Only the weight source and the batches differ. Meta tensors are used and not
FakeTensorMode, because FakeTensorMode cannot build packed weights, makes transformers build a mask
and is three times slower.

If groups of blocks are alike (`block_groups.py`), only a few of them run, and their recorded events
are repeated for the others (`recording.py`). The events are then replayed to the memory model of
the target device (`replay.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora_cli.data.collate import Batch
from qlora_cli.device import DeviceProfile
from qlora_cli.files.dtype import file_dtype
from qlora_cli.memory.gc_pause import gc_paused
from qlora_cli.memory.ledger import FigureSource, MethodPeak, Phase, peak_phase
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.tracker import StorageTracker, track_gradients
from qlora_cli.models.build import ModelRequest, skeleton
from qlora_cli.models.derive import structure_of
from qlora_cli.models.family import Family
from qlora_cli.models.registry import known_family
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.plan.block_groups import BlockGroups, find_groups
from qlora_cli.plan.meta_source import MetaCopy, MetaSource
from qlora_cli.plan.recording import NotAlike, Recording
from qlora_cli.plan.replay import MemoryPlan, RecordedJob, replay
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.registry import task_of
from qlora_cli.tasks.task import Task
from qlora_cli.train.schedule import learning_rate
from qlora_cli.train.state import State, build_state, tag_living
from qlora_cli.train.step import train_step


def dry_run(
    recipe: Recipe,
    config: Any,
    profile: DeviceProfile,
    step_batches: Sequence[Batch],
    eval_batches: Sequence[Batch] = (),
    has_copy: bool = False,
) -> MemoryPlan:
    """Plan loading, the first step, a later step and evaluation on the device of `profile`.

    recipe: resolved, without `auto`. config: transformers' config of the base; it is not modified.
    step_batches: micro-batches of one optimizer step, on the CPU: the largest first one, and the
    largest later one if there are several. Later micro-batches run while gradients exist, so two
    represent any number. eval_batches: the largest batches of the evaluation, on the CPU; empty if
    the job does not evaluate. has_copy: the base is loaded from its packed copy. Raises the errors
    of `build_state` and `train_step`.
    """
    job = _DryRun(recipe, profile, step_batches, eval_batches, has_copy)
    # Garbage collection would make the plan depend on when it runs, and would scan a hundred
    # thousand recorded events each time.
    with gc_paused():
        return _plan(job, config)


def _plan(job: _DryRun, config: Any) -> MemoryPlan:
    """Run a few groups of blocks and repeat them if they are alike, else run all blocks."""
    groups = _groups(job.recipe, config)
    if groups is not None:
        shorter = with_blocks(config, groups.num_recorded_blocks)
        try:
            return replay(job.record(shorter, groups), groups.number)
        except NotAlike:
            pass
    num_blocks = config.num_hidden_layers
    return replay(job.record(config, BlockGroups(0, 1, num_blocks)), num_blocks)


def with_blocks(config: Any, num_blocks: int) -> Any:
    """Return a copy of a transformers config with the first `num_blocks` blocks only."""
    shorter = deepcopy(config)
    shorter.num_hidden_layers = num_blocks
    for key, values in _per_layer(config).items():
        setattr(shorter, key, values[:num_blocks])
    if overrides := _overrides(config):
        shorter.per_layer_config = {i: v for i, v in overrides.items() if i < num_blocks}
    return shorter


def num_kinds_prefix(config: Any) -> int:
    """Return the smallest number of first blocks that contain a block of every kind."""
    kinds = _settings_of_blocks(config)
    return max(kinds.index(kind) for kind in kinds) + 1


def _settings_of_blocks(config: Any) -> list[str]:
    """Return the settings of each block that may differ between blocks."""
    overrides, per_layer = _overrides(config), _per_layer(config).values()
    return [
        repr([*(values[index] for values in per_layer), overrides.get(index)])
        for index in range(config.num_hidden_layers)
    ]


def _overrides(config: Any) -> dict[int, Any]:
    """Return the number of a block -> settings that only this block has."""
    overrides = config.to_dict().get("per_layer_config") or {}
    return {int(index): settings for index, settings in overrides.items()}


def _per_layer(config: Any) -> dict[str, Sequence[Any]]:
    """Return the settings of a config that have one value per block."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers
    }


def method_peak(recipe: Recipe, phases: tuple[Phase, ...], source: FigureSource) -> MethodPeak:
    """Return the peak of a job with the recipe's method, from its planned or measured phases."""
    peak = peak_phase(phases)
    return MethodPeak(
        recipe.adapter.method, source, peak.peak_bytes, peak.at_peak, recipe.base.bits
    )


def _groups(recipe: Recipe, config: Any) -> BlockGroups | None:
    """Return the groups of blocks that recipe and config treat the same; None if there are none."""
    targets = recipe.adapter.targets
    are_roles = isinstance(targets, str) or not any("." in target for target in targets)
    # Blocks that use the keys and values of earlier ones depend on the number of blocks.
    if not are_roles or getattr(config, "num_kv_shared_layers", None):
        return None
    kinds = _settings_of_blocks(config)
    if known_family(config) is None:
        model, family = skeleton(config, torch.float32, task_of(recipe).model_class)
        blocks: Any = model.get_submodule(family.blocks)
        kinds = [f"{kind} {sorted(structure_of(b))}" for kind, b in zip(kinds, blocks, strict=True)]
    return find_groups(kinds)


@dataclass(frozen=True)
class _DryRun:
    """A job to run on meta tensors, with any number of blocks. See `dry_run` for the fields."""

    recipe: Recipe
    profile: DeviceProfile
    step_batches: Sequence[Batch]
    eval_batches: Sequence[Batch]
    has_copy: bool

    def record(self, config: Any, groups: BlockGroups) -> RecordedJob:
        """Run the complete job with a model of the config's number of blocks."""
        recording = Recording(groups.group_of)
        memory_model = MemoryModel.of(self.profile)
        tracker = memory_model.new_tracker(recording, "meta")
        dtype = file_dtype(config)
        meta = torch.device("meta")
        total = (0, 0)
        sums = partial(_sums, middle=groups.middle)

        def make_source(model: nn.Module, family: Family) -> MetaSource:
            nonlocal total
            recording.blocks = family.blocks
            total = sums(dict(model.named_parameters()), family, nn.Parameter.numel)
            return MetaSource(model, family, dtype)

        clear_scale_codebook(meta)
        with tracker:
            recording.begin_phase()
            given = (self.recipe, config, make_source, meta, self.profile)
            copy = MetaCopy() if self.has_copy else None
            state = build_state(ModelRequest(*given, copy=copy))
            tag_living(state, tracker)
            recording.end_phase("load")
            recording.release_cache()
            self._run_phases(state, tracker, recording)
        family = state.loaded.family
        num_groups = BlockGroups(groups.first, groups.period, config.num_hidden_layers).number
        num_tokens = max(batch.num_tokens for batch in self.step_batches)
        return RecordedJob(
            segments=recording.segments,
            num_blocks=num_groups,
            memory_model=memory_model,
            total=total,
            trained=sums(state.trainable, family, nn.Parameter.numel),
            trained_bytes=sums(state.trainable, family, lambda p: p.numel() * p.element_size()),
            input_bytes=num_tokens
            * config.hidden_size
            * state.loaded.weight_format.compute.itemsize
            * groups.period,
            has_single_blocks=groups.period == 1,
        )

    def _run_phases(self, state: State, tracker: StorageTracker, recording: Recording) -> None:
        """Run all phases after loading."""
        loaded = state.loaded
        _report_active_blocks(loaded.model.get_submodule(loaded.family.blocks), recording)
        if state.task.needs_constants:
            recording.begin_phase()
            for batch in (*self.step_batches, *self.eval_batches):
                state.task.constants(loaded, batch, state.device)
            recording.end_phase("eval")
            recording.release_cache()
        step_batches, eval_batches = (
            [with_constants(batch, state.task) for batch in batches]
            for batches in (self.step_batches, self.eval_batches)
        )
        with track_gradients(state.trainable.values(), tracker):
            for step, name in enumerate(("first_step", "step")):
                recording.begin_phase()
                train_step(state, step_batches, learning_rate(self.recipe.train, step, 2))
                recording.end_phase(name)
        # Saving a checkpoint writes living tensors to files and allocates nothing on the device.
        recording.begin_phase()
        recording.end_phase("checkpoint")
        if eval_batches:
            recording.begin_phase()
            state.task.evaluate(loaded, eval_batches, state.device)
            recording.end_phase("eval")


def with_constants(batch: Batch, task: Task) -> Batch:
    """Return the batch with constants of any value, if the task needs them."""
    if not task.needs_constants:
        return batch
    width = len(task.segment_names)
    return replace(batch, constants=torch.zeros(len(batch.segments) // width, width))


def _sums(
    parameters: dict[str, nn.Parameter],
    family: Family,
    size: Callable[[nn.Parameter], int],
    middle: range,
) -> tuple[int, int]:
    """Return (sum of `size` over all parameters, sum over the blocks `middle`)."""
    prefixes = tuple(f"{family.blocks}.{block}." for block in middle)
    of_group = sum(size(p) for name, p in parameters.items() if name.startswith(prefixes))
    return sum(map(size, parameters.values())), of_group


def _report_active_blocks(blocks: Any, recording: Recording) -> None:
    """Report to the recording which block runs, in the forward and the backward pass."""
    for index, block in enumerate(blocks):
        path = f"{recording.blocks}.{index}"
        block.forward = _reporting_forward(block.forward, path, recording)


def _reporting_forward(
    forward: Callable[..., Any], path: str, recording: Recording
) -> Callable[..., Any]:
    def reporting_forward(*args: Any, **kwargs: Any) -> Any:
        # The block stays active until the next one runs, because it frees the previous one's
        # output.
        recording.enter_module(path)
        output = forward(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple | list) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: recording.enter_module(path))
        return output

    return reporting_forward
