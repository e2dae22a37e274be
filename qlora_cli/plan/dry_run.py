"""Plans a job's memory by running the job itself on meta tensors.

The dry run calls the same `build_state` and `train_step` as the job, with the storage tracker
around them. Only the weight source and the batches differ. Meta tensors are used and not
FakeTensorMode, because FakeTensorMode cannot build packed weights, makes transformers build a mask
and is three times slower.

If groups of blocks are alike (`block_groups.py`), only a few of them run, and their recorded events
are repeated for the others (`repeat.py`). The events are then replayed to the memory model of
the target device (`replay.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.data.collate import Batch
from qlora_cli.device import DeviceProfile
from qlora_cli.files.dtype import file_dtype
from qlora_cli.memory.gc_pause import gc_paused
from qlora_cli.memory.ledger import STEP_PHASES, FigureSource, MethodPeak, Phase, peak_phase
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.tracker import StorageTracker, track_gradients
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.depth import num_blocks
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.nn.host_head import HostHead
from qlora_cli.parallel.processes import PlannedProcesses
from qlora_cli.plan.active_blocks import report_active_blocks
from qlora_cli.plan.block_groups import BlockGroups, GroupSample
from qlora_cli.plan.config_blocks import groups_of, matched_overrides, with_blocks
from qlora_cli.plan.meta_source import MetaCopy, MetaSource
from qlora_cli.plan.recording import Recording
from qlora_cli.plan.repeat import NotAlike
from qlora_cli.plan.replay import MemoryPlan, RecordedJob, replay
from qlora_cli.recipe.activations import recomputed_blocks
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.schema import Recipe
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

    recipe: resolved, without `auto`. The other arguments and the errors are those of `DryRun`.
    Raises RecipeError if the recipe recomputes more blocks than there are.
    """
    number = recomputed_blocks(recipe.train.activation_checkpointing, num_blocks(config))
    job = DryRun(recipe, config, profile, step_batches, eval_batches, has_copy=has_copy)
    return job.plan(number)


def method_peak(recipe: Recipe, phases: tuple[Phase, ...], source: FigureSource) -> MethodPeak:
    """Return the peak of a job with the recipe's method, from its planned or measured phases."""
    peak, base = peak_phase(phases), recipe.base
    bits = None if base.overrides else base.default_bits
    return MethodPeak(recipe.adapter.method, source, peak.peak_bytes, peak.at_peak, bits)


class DryRun:
    """A job that is planned with one or several activation policies.

    recipe: resolved; its activation policy is not used. config: transformers' config of the base;
    it is not modified. profile: the target device. step_batches: micro-batches of one optimizer
    step, on the CPU: the largest first one, and the largest later one if there are several. Later
    micro-batches run while gradients exist, so two represent any number. eval_batches: the largest
    batches of the evaluation, on the CPU; empty if the job does not evaluate. has_copy: the base is
    loaded from its packed copy.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: Any,
        profile: DeviceProfile,
        step_batches: Sequence[Batch],
        eval_batches: Sequence[Batch] = (),
        *,
        has_copy: bool = False,
    ) -> None:
        self.recipe = recipe
        self.config = config
        self.profile = profile
        self._step_batches = step_batches
        self._eval_batches = eval_batches
        self._has_copy = has_copy
        self._groups = groups_of(recipe, config)
        self._recorded: dict[tuple[int, int], RecordedJob] = {}

    @property
    def policies(self) -> tuple[int, ...]:
        """Return the numbers of recomputed blocks that are quick to plan, ascending."""
        number = num_blocks(self.config)
        return self._groups.boundaries if self._groups else tuple(range(number + 1))

    def is_recorded(self, num_recomputed: int) -> bool:
        """Return whether a plan of this policy needs no further recording."""
        sample = self._groups.sample(num_recomputed) if self._groups else None
        return sample is not None and (sample.number, sample.recomputed) in self._recorded

    def plan(self, num_recomputed: int) -> MemoryPlan:
        """Return the plan if the first `num_recomputed` blocks are recomputed.

        A few groups of blocks run and are repeated if they are alike, else all blocks run. Raises
        the errors of `build_state` and `train_step`.
        """
        # Garbage collection would make the plan depend on when it runs, and would scan a hundred
        # thousand recorded events each time.
        with gc_paused():
            plan = self._extended(num_recomputed) or self._complete(num_recomputed)
        number = num_blocks(self.config)
        moved = 0
        if self.recipe.train.offload_inputs is True and num_recomputed:
            # All are copied to the host. The last one is still on the device when it is needed.
            moved = (2 * num_recomputed - 1) * self._input_bytes
        return replace(
            plan,
            num_blocks=number,
            num_recomputed=num_recomputed,
            input_bytes=self._input_bytes,
            moved_inputs=moved,
        )

    @property
    def _input_bytes(self) -> int:
        """Return the bytes of the input of one block for the largest micro-batch."""
        compute = getattr(torch, self.recipe.base.compute_dtype)
        tokens = max(batch.num_tokens for batch in self._step_batches)
        return tokens * int(self.config.hidden_size) * int(compute.itemsize)

    def _extended(self, num_recomputed: int) -> MemoryPlan | None:
        """Plan with the recording of a few groups; None if they do not represent all blocks."""
        groups = self._groups
        sample = groups.sample(num_recomputed) if groups else None
        if groups is None or sample is None:
            return None
        try:
            return replay(self._record(groups, sample), sample.repeats)
        except NotAlike:
            self._groups = None
            return None

    def _complete(self, num_recomputed: int) -> MemoryPlan:
        """Plan with a recording of all blocks."""
        number = num_blocks(self.config)
        sample = GroupSample(number, num_recomputed, ())
        return replay(self._record(BlockGroups(0, 1, number), sample), ())

    def _record(self, groups: BlockGroups, sample: GroupSample) -> RecordedJob:
        """Return the recording of a sample of groups. Samples of other policies are kept."""
        key = (sample.number, sample.recomputed)
        if key not in self._recorded:
            self._recorded[key] = self._run(groups, sample)
        return self._recorded[key]

    def _run(self, groups: BlockGroups, sample: GroupSample) -> RecordedJob:
        """Run the complete job with a model of the sample's groups."""
        config = with_blocks(self.config, groups.blocks_of(sample.number))
        recomputed = groups.first_blocks(sample.recomputed, sample.number)
        recipe = with_settings(self.recipe, "train", activation_checkpointing=recomputed)
        if num_blocks(config) < num_blocks(self.config):
            overrides = matched_overrides(recipe, config)
            recipe = with_settings(recipe, "base", overrides=overrides)
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
            given = (recipe, config, make_source, meta, self.profile)
            is_kept = self._has_copy or recipe.base.residency == "disk"
            copy = MetaCopy(exists=self._has_copy) if is_kept else None
            processes = PlannedProcesses(self.profile.count)
            state = build_state(ModelRequest(*given, copy=copy, processes=processes))
            tag_living(state, tracker)
            recording.end_phase("load")
            recording.release_cache()
            if state.division.sharded is not None:
                recording.begin_phase()
                state.division.divide()
                recording.end_phase("load")
                recording.release_cache()
            self._run_phases(state, tracker, recording)
        family, head = state.loaded.family, state.loaded.head
        stored_twice = _stored_twice(state.loaded)
        num_tokens = max(batch.num_tokens for batch in self._step_batches)
        return RecordedJob(
            segments=recording.segments,
            num_blocks=sample.number,
            memory_model=memory_model,
            total=total,
            trained=sums(state.trainable, family, nn.Parameter.numel),
            trained_bytes=sums(
                state.trainable, family, lambda p: p.nbytes * (1 + (id(p) in stored_twice))
            ),
            input_bytes=self._input_bytes * groups.period,
            has_single_blocks=groups.period == 1,
            streamed_bytes=_streamed_bytes(state.loaded, groups, sample.number),
            num_tokens=num_tokens,
            head_bytes=head.num_bytes if isinstance(head, HostHead) else 0,
        )

    def _run_phases(self, state: State, tracker: StorageTracker, recording: Recording) -> None:
        """Run all phases after loading."""
        loaded = state.loaded
        report_active_blocks(loaded.model.get_submodule(loaded.family.blocks), recording)
        if state.task.needs_constants:
            recording.begin_phase()
            for batch in (*self._step_batches, *self._eval_batches):
                state.task.constants(loaded, batch, state.device)
            recording.end_phase("eval")
            recording.release_cache()
        step_batches, eval_batches = (
            [state.task.planned(batch) for batch in batches]
            for batches in (self._step_batches, self._eval_batches)
        )
        with track_gradients(state.trainable.values(), tracker):
            # The passes of the first step run before the optimizer has states, those of a second
            # step beside them. A job of one step has no second one.
            phases = STEP_PHASES[:1] if self.recipe.train.steps == 1 else STEP_PHASES
            for step, name in enumerate(phases):
                recording.begin_phase()
                train_step(state, step_batches, learning_rate(self.recipe.train, step, 2))
                recording.end_phase(name)
        # Saving a checkpoint writes living tensors to files and allocates nothing on the device,
        # except copies in host memory of parameters that are not complete.
        recording.begin_phase()
        with state.division.completed():
            pass
        recording.end_phase("checkpoint")
        if eval_batches:
            recording.begin_phase()
            state.task.evaluate(loaded, eval_batches, state.device)
            recording.end_phase("eval")


def _stored_twice(loaded: LoadedModel) -> set[int]:
    """Return the ids of A and B that a file has next to their first values (`adapter.init`)."""
    layers = [layer for _, layer in adapted_layers(loaded.model) if layer.initial]
    return {id(p) for y in layers for p in (*y.lora_a.values(), *y.lora_b.values())}


def _streamed_bytes(loaded: LoadedModel, groups: BlockGroups, number: int) -> list[int]:
    """Return the streamed weights of each of the recorded groups. number: of them."""
    sizes = [0] * (number + 1)  # The last blocks may be no complete group.
    for block, num_bytes in enumerate(loaded.stream.block_bytes if loaded.stream else ()):
        sizes[groups.group_of(block)] += num_bytes
    return sizes


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
