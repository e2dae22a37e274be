"""Divides the trained parameters over the processes of a job (ZeRO, stage 1 to 3).

Each process updates its pieces of the parameters: only for these it keeps gradients after the
backward passes, and optimizer states. It has all parameters complete, except those of blocks whose
base is sharded (`sharded_parameters.py`). A parameter is cut at multiples of a unit, so that
an optimizer that works on one value, or on one block of values, gives the same result for a piece
as for the complete parameter.

The parameters of a block are exchanged together: their gradients are added up, and each process
receives the sums of its pieces; after the update each process receives the pieces of the others.
So no process ever has a second buffer of all gradients, and in a dry run the blocks are alike.
Source: Rajbhandari et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import torch
from torch import nn

from qlora_cli.memory.release import free_now
from qlora_cli.memory.scopes import scope
from qlora_cli.parallel.processes import Processes
from qlora_cli.train.bucket import Bucket, Cuts, copy_pairs
from qlora_cli.train.sharded_parameters import ShardedParameters


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


class Division:
    """The pieces of all trained parameters, of which this process has those of its rank.

    trainable: name -> parameter. blocks: path of the list of blocks. unit: as of `OptimizerEntry`.
    processes: those of the job. num_sharded: number of first blocks of which each process keeps
    nothing but its pieces, after `divide`. Of a job of one process, the pieces are the parameters
    themselves.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        blocks: str,
        unit: int,
        processes: Processes,
        num_sharded: int = 0,
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
        self._buckets: list[Bucket] = []
        sharded: list[list[Bucket]] = [[] for _ in range(num_sharded)]
        for block, numbers in grouped_by_block(trainable, blocks):
            is_sharded = block is not None and block < num_sharded
            buckets = sharded[block] if is_sharded and block is not None else self._buckets
            buckets.append(self._bucket(numbers))
        self.sharded: ShardedParameters | None = None
        if any(sharded):
            self.sharded = ShardedParameters(sharded, blocks, processes)

    def _bucket(self, numbers: Sequence[int]) -> Bucket:
        return Bucket(
            [self.parameters[number] for number in numbers],
            [self.cuts[number] for number in numbers],
            [self.pieces[number] for number in numbers],
        )

    def divide(self) -> None:
        """Free the complete parameters of sharded blocks, whose values are final then."""
        if self.sharded is not None:
            self.sharded.divide()

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Have all parameters complete in the main process inside the block.

        All processes call this together.
        """
        if self.sharded is None:
            yield
            return
        with self.sharded.completed():
            yield

    def end_backward(self) -> None:
        """Add up what the backward pass of a micro-batch has left. All processes call this."""
        if self.sharded is not None:
            self.sharded.leave()

    def have_gradient(self) -> tuple[bool, ...]:
        """Return for each parameter whether it has got a gradient here in this step."""
        used = self.sharded.used if self.sharded is not None else set()
        pairs = zip(self.parameters, self.pieces, strict=True)
        return tuple(parameter.grad is not None or piece in used for parameter, piece in pairs)

    def add_gradients(self, present: Sequence[Sequence[bool]]) -> None:
        """Give each piece the sum of the gradients of all processes, and free those of parameters.

        present: for each process, whether each parameter has a gradient. A piece of a parameter
        without a gradient in any process gets none. Those of sharded blocks have their sum already.
        """
        used = {
            piece
            for piece, *flags in zip(self.pieces, *present, strict=True)
            if any(flags) and piece.numel()
        }
        for bucket in self._buckets:
            self._add(bucket, used)
        for piece in self.pieces:
            if piece not in used:
                piece.grad = None

    def _add(self, bucket: Bucket, used: Set[nn.Parameter]) -> None:
        """Add up the gradients of some parameters. used: the pieces that get one."""
        share = bucket.added_gradients(self.processes)
        for piece, part in zip(bucket.pieces, bucket.own_parts(share), strict=True):
            piece.grad = part if piece in used else None

    def zero_grad(self) -> None:
        """Free the gradients of the parameters."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.sharded is not None:
            self.sharded.forget_gradients()

    def release(self) -> None:
        """Free the complete parameters of sharded blocks, because their pieces change."""
        if self.sharded is not None:
            self.sharded.release()

    @torch.no_grad()
    def exchange_pieces(self) -> None:
        """Give every process the pieces that the others have updated, except of sharded blocks."""
        for bucket in self._buckets:
            self._exchange(bucket)

    def _exchange(self, bucket: Bucket) -> None:
        """Exchange the pieces of some parameters. Its buffers are freed before the next ones."""
        first, size = bucket.parameters[0], self.processes.size
        with scope("temporary"):
            complete = first.new_empty(size * bucket.num_values)
            share = first.new_empty(bucket.num_values)
        copy_pairs(zip(bucket.own_parts(share), bucket.pieces, strict=True))
        exchange = self.processes.gather_parts(complete, share)
        if exchange is not None:
            exchange.wait()
        values = [parameter.view(-1) for parameter in bucket.parameters]
        copy_pairs((value, part) for part, value in bucket.pairs(complete, values))
        free_now([complete, share])


def grouped_by_block(
    trainable: Mapping[str, nn.Parameter], blocks: str
) -> Iterator[tuple[int | None, list[int]]]:
    """Yield the block and the numbers of parameters that are exchanged or updated together.

    Those of one block and dtype are; one outside of the blocks, which may be large, is alone.
    """
    groups: dict[tuple[int | str, torch.dtype], list[int]] = {}
    for number, (name, parameter) in enumerate(trainable.items()):
        own: int | str = name
        if name.startswith(f"{blocks}."):
            own = int(name.removeprefix(f"{blocks}.").partition(".")[0])
        groups.setdefault((own, parameter.dtype), []).append(number)
    for (own, _), numbers in groups.items():
        yield (own if isinstance(own, int) else None), numbers
