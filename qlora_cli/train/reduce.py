"""Adds up what the processes of a job computed for one optimizer step.

Each process has the gradients of its own micro-batches, already divided by the number of targets of
the whole step. So their sum is the gradient of one process that computes all micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.errors import MicroBatchTooLarge
from qlora_cli.parallel.processes import Processes
from qlora_cli.tasks.task import MetricSums
from qlora_cli.train.division import Division


@dataclass(frozen=True)
class _Report:
    """What a process reports to the others before gradients are added up.

    shortage: what its memory did not suffice for. has_gradient: for each trained parameter. sums:
    its sums of the loss and of the task's other metrics.
    """

    shortage: str | None
    has_gradient: tuple[bool, ...] = ()
    sums: tuple[tuple[str, float], ...] = ()


_LOSS = ""
"""Name of the loss among the sums; no metric has it."""


def report_shortage(processes: Processes, what: str) -> None:
    """Report to the other processes that this one ran out of memory in the step."""
    processes.gather(_Report(what))


def reduce_step(division: Division, total: Tensor, metrics: MetricSums) -> None:
    """Replace gradients, loss and metrics of this process by their sums over all processes.

    division: of the trained parameters, whose pieces get the gradients. total: the loss, a scalar.
    Raises MicroBatchTooLarge if a process ran out of memory; all raise it then.
    """
    processes = division.processes
    if processes.size == 1:
        return
    sums = {_LOSS: total, **metrics.sums}
    values = [0.0] * len(sums) if total.is_meta else torch.stack(list(sums.values())).tolist()
    report = _Report(None, division.have_gradient(), tuple(zip(sums, values, strict=True)))
    reports = processes.gather(report)
    for rank, other in enumerate(reports):
        if other.shortage is not None:
            raise MicroBatchTooLarge(f"process {rank}: {other.shortage}")
    division.add_gradients([other.has_gradient for other in reports])
    added: dict[str, float] = {}
    for name, value in (item for other in reports for item in other.sums):
        added[name] = added.get(name, 0.0) + value
    total.fill_(added.pop(_LOSS))
    metrics.sums = {name: torch.full_like(total, value) for name, value in added.items()}
