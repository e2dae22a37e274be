"""Trained parameters that the processes of a job exchange together, and their layout in a buffer.

A buffer has the shares of all processes, in the order of the ranks and all of one size. The share
of a process is its piece of each parameter, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from qlora_cli.memory.release import free_now
from qlora_cli.memory.scopes import scope
from qlora_cli.parallel.processes import Processes

Cuts = Sequence[int]
"""Where a parameter is cut: the piece of process r is that of the values [cuts[r], cuts[r + 1])."""


@dataclass(frozen=True)
class Bucket:
    """Parameters that are exchanged together, all of one dtype. pieces: those of this process."""

    parameters: Sequence[nn.Parameter]
    cuts: Sequence[Cuts]
    pieces: Sequence[nn.Parameter]

    @cached_property
    def num_values(self) -> int:
        """The values of the largest share of a process."""
        shares = ([end - start for start, end in pairwise(cuts)] for cuts in self.cuts)
        return max(map(sum, zip(*shares, strict=True)))

    def pairs(
        self, complete: Tensor, values: Sequence[Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each part of a buffer with the shares of all processes, and the values it is for.

        complete: the shares, in the order of the ranks, each of `num_values`. values: of each
        parameter, flat; None to leave it out.
        """
        for rank in range(complete.numel() // self.num_values):
            start = rank * self.num_values
            for tensor, cuts in zip(values, self.cuts, strict=True):
                length = cuts[rank + 1] - cuts[rank]
                if tensor is not None and length:
                    yield complete[start : start + length], tensor[cuts[rank] : cuts[rank + 1]]
                start += length

    def own_parts(self, share: Tensor) -> Iterator[Tensor]:
        """Yield the part of this process' share that belongs to each piece."""
        start = 0
        for piece in self.pieces:
            yield share[start : start + piece.numel()]
            start += piece.numel()

    def added_gradients(self, processes: Processes) -> Tensor:
        """Return this process' share of the sum of the gradients of all. Those here are freed.

        A parameter without a gradient counts as zero.
        """
        first = self.parameters[0]
        with scope("gradients"), torch.no_grad():
            complete = first.new_zeros(processes.size * self.num_values)
            share = first.new_empty(self.num_values)
        gradients = [None if p.grad is None else p.grad.reshape(-1) for p in self.parameters]
        copy_pairs(self.pairs(complete, gradients))
        del gradients
        for parameter in self.parameters:
            parameter.grad = None
        processes.add_parts(share, complete)
        free_now([complete])
        return share


def copy_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first."""
    targets, sources = [], []
    for target, source in pairs:
        targets.append(target)
        sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)
