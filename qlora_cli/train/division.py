"""Divides the trained parameters over the processes of a job (ZeRO, stage 1).

Each process has all parameters, and updates its pieces of them: only for these it keeps gradients
after the backward passes, and optimizer states. A parameter is cut at multiples of a unit, so that
an optimizer that works on one value, or on one block of values, gives the same result for a piece
as for the complete parameter.

The parameters of a block are exchanged together: their gradients are added up, and each process
receives the sums of its pieces; after the update each process receives the pieces of the others.
So no process ever has a second buffer of all gradients, and in a dry run the blocks are alike.
Source: Rajbhandari et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import scope
from qlora_cli.parallel.processes import Processes

Cuts = Sequence[int]
"""Where a parameter is cut: the piece of process r is that of the values [cuts[r], cuts[r + 1])."""


def cuts_of(num_values: int, size: int, unit: int) -> Cuts:
    """Return the cuts of a parameter for `size` processes, multiples of `unit` except for the end.

    The first processes have at most one unit more. The values after the last complete unit belong
    to the last piece that is not empty.
    """
    each, more = divmod(num_values // unit, size)
    starts = [unit * (rank * each + min(rank, more)) for rank in range(size + 1)]
    end = max(starts)
    last = max((rank for rank in range(size) if starts[rank] < end), default=0)
    return [start if rank <= last else num_values for rank, start in enumerate(starts)]


@dataclass(frozen=True)
class _Bucket:
    """Parameters that are exchanged together, all of one dtype. pieces: those of this process."""

    parameters: Sequence[nn.Parameter]
    cuts: Sequence[Cuts]
    pieces: Sequence[nn.Parameter]

    @property
    def num_values(self) -> int:
        """Return the values of the largest share of a process."""
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


class Division:
    """The pieces of all trained parameters, of which this process has those of its rank.

    trainable: name -> parameter. blocks: path of the list of blocks. unit: as of `OptimizerEntry`.
    processes: those of the job. Of a job of one process, the pieces are the parameters themselves.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        blocks: str,
        unit: int,
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.parameters = list(trainable.values())
        self.cuts = [cuts_of(p.numel(), processes.size, unit) for p in self.parameters]
        self.pieces = self.parameters
        if processes.size > 1:
            rank = processes.rank
            self.pieces = [
                nn.Parameter(parameter.detach().view(-1)[cuts[rank] : cuts[rank + 1]])
                for parameter, cuts in zip(self.parameters, self.cuts, strict=True)
            ]
        self._buckets = [
            _Bucket(
                [self.parameters[number] for number in numbers],
                [self.cuts[number] for number in numbers],
                [self.pieces[number] for number in numbers],
            )
            for numbers in _together(trainable, blocks)
        ]

    def add_gradients(self, present: Sequence[Sequence[bool]]) -> None:
        """Give each piece the sum of the gradients of all processes, and free those of parameters.

        present: for each process, whether each parameter has a gradient. A piece of a parameter
        without a gradient in any process gets none.
        """
        used = {
            piece
            for piece, *flags in zip(self.pieces, *present, strict=True)
            if any(flags) and piece.numel()
        }
        for bucket in self._buckets:
            self._add(bucket, used)

    def _add(self, bucket: _Bucket, used: Set[nn.Parameter]) -> None:
        """Add up the gradients of some parameters. used: the pieces that get one."""
        first, size = bucket.parameters[0], self.processes.size
        with scope("gradients"), torch.no_grad():
            complete = first.new_zeros(size * bucket.num_values)
            share = first.new_empty(bucket.num_values)
        gradients = [None if p.grad is None else p.grad.reshape(-1) for p in bucket.parameters]
        _copy(bucket.pairs(complete, gradients))
        del gradients
        for parameter in bucket.parameters:
            parameter.grad = None
        self.processes.add_parts(share, complete)
        for piece, part in zip(bucket.pieces, bucket.own_parts(share), strict=True):
            piece.grad = part if piece in used else None

    @torch.no_grad()
    def exchange_pieces(self) -> None:
        """Give every process the pieces that the others have updated."""
        for bucket in self._buckets:
            self._exchange(bucket)

    def _exchange(self, bucket: _Bucket) -> None:
        """Exchange the pieces of some parameters. Its buffers are freed before the next ones."""
        first, size = bucket.parameters[0], self.processes.size
        with scope("temporary"):
            complete = first.new_empty(size * bucket.num_values)
            share = first.new_empty(bucket.num_values)
        _copy(zip(bucket.own_parts(share), bucket.pieces, strict=True))
        exchange = self.processes.gather_parts(complete, share)
        if exchange is not None:
            exchange.wait()
        values = [parameter.view(-1) for parameter in bucket.parameters]
        _copy((value, part) for part, value in bucket.pairs(complete, values))


def _together(trainable: Mapping[str, nn.Parameter], blocks: str) -> list[list[int]]:
    """Return the numbers of parameters that are exchanged together.

    Those of one block and dtype are; one outside of the blocks, which may be large, is alone.
    """
    groups: dict[tuple[str, torch.dtype], list[int]] = {}
    for number, (name, parameter) in enumerate(trainable.items()):
        block = name.removeprefix(f"{blocks}.").partition(".")[0]
        own = block if name.startswith(f"{blocks}.") else name
        groups.setdefault((own, parameter.dtype), []).append(number)
    return list(groups.values())


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first."""
    targets, sources = [], []
    for target, source in pairs:
        targets.append(target)
        sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)
