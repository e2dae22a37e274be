"""What the processes of a training job exchange before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora_cli.errors import UsageError
from qlora_cli.events import Silent
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.memory.instrument import Instrument
from qlora_cli.parallel.processes import Processes
from qlora_cli.recipe.base import SHARD
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.state import State, tag_optimizer


@dataclass(frozen=True)
class JobStart:
    """What the main process has decided before loading, for the others.

    recipe: resolved, with every choice. data_digest: of the rows. parts, may_recompute_more: as of
    `TrainingLoop`. resumes: whether it restores a checkpoint.
    """

    recipe: Recipe
    data_digest: str
    parts: int
    may_recompute_more: bool
    resumes: bool


def check_processes(recipe: Recipe, number: int) -> None:
    """Raise UsageError if a recipe cannot be trained by this number of processes."""
    if number == 1:
        if recipe.base.residency == SHARD:
            raise UsageError(
                "shard shares the base among several processes, and there is one",
                where="base.residency",
                hint="start several with --processes, plan them with --devices, or set "
                "base.residency=host",
            )
        return
    if recipe.adapter.is_initialized:
        raise UsageError(
            f"{recipe.adapter.init} needs one process, and there are {number}",
            where="adapter.init",
            hint="set adapter.init=default, or start one process",
        )
    train = recipe.train
    if train.micro_batch == "auto":
        raise UsageError(
            f"auto chooses for one process, and there are {number}",
            where="train.micro_batch",
            hint="set a number; `qlora plan --fit` finds the largest one that fits",
        )
    if train.update_in_backward:
        raise UsageError(
            f"updates in the backward pass need one process, and there are {number}",
            where="train.update_in_backward",
            hint="set it to false: several processes add up gradients after the backward pass",
        )
    if train.grad_accum < number:
        raise UsageError(
            f"a step has {train.grad_accum} micro-batch{'' if train.grad_accum == 1 else 'es'}, "
            f"and {number} processes share them",
            where="train.grad_accum",
            hint="train.grad_accum counts the micro-batches of a step over all processes; set it "
            f"to a multiple of {number}, or start fewer processes",
        )


@contextmanager
def take_turns(processes: Processes, prepared: Prepared) -> Iterator[None]:
    """Run the block first in one process of each machine, if it keeps a packed copy of the base.

    The others then read the copy. Without a copy all run at once, and so they do if each keeps a
    part of the base, because then none of them can write a copy.
    """
    is_sharded = prepared.recipe.base.residency == SHARD
    if processes.size > 1 and not is_sharded and prepared.packed_store(Silent()) is not None:
        if processes.local_rank > 0:
            processes.wait()
            yield
        else:
            yield
            processes.wait()
        return
    yield


def share_state(state: State, instrument: Instrument) -> None:
    """Give all processes the state of the main one: trained weights, loss scale and step.

    Of the optimizer's states, each process has got its part when they were restored. If the base is
    sharded, it keeps only its part of the trained weights. instrument: measures the phase `load`,
    and registers restored states of the optimizer.
    """
    tag_optimizer(state, instrument.tracker)
    processes = state.processes
    if processes.size == 1:
        return
    # NCCL and gloo wait 10 and 30 minutes for a process that is still loading, this one longer.
    processes.wait()
    with torch.no_grad():
        for parameter in state.trainable.values():
            processes.copy_from_main(parameter.data)
    state.step, scale = processes.broadcast((state.step, state.loss_scale.state()))
    state.loss_scale.restore(scale)
    if state.division.sharded is not None:
        with instrument.phase("load"):
            state.division.divide()
        instrument.release_cache()
