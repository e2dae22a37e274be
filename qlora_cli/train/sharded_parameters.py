"""Shards the trained parameters of the blocks whose base is sharded (`block_shards.py`).

Each process keeps its pieces of them, and of their gradients and optimizer states. The parameters
of a block are complete while it runs, in the forward pass and from its recomputation to the end of
its backward pass. There are two buffers on the device: one has the complete parameters of the block
that runs, and the other one receives the pieces of the block that probably runs next. After the
backward pass of a block its gradients are added up over the processes, and each process adds its
share to the gradients of its pieces.

Autograd reads the parameters of a block only while the block runs: it is recomputed, so its forward
pass saves none of them, and the backward pass of a block ends before another one is recomputed. A
parameter that is not complete has the value NaN, which shows in the loss if it is read. All
processes must run the same blocks in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora_cli.memory.scopes import module_scope, scope, unallocated
from qlora_cli.models.placement.weight_store import aligned, host_copy
from qlora_cli.parallel.processes import Exchange, Processes
from qlora_cli.train.bucket import Bucket, copy_pairs

_Layout = Sequence[tuple[int, torch.dtype]]
"""Number of values and dtype of each tensor in a buffer."""


class ShardedParameters:
    """The trained parameters of sharded blocks, of which each process keeps its pieces.

    blocks: the buckets of each sharded block. path: of the list of blocks. processes: those of the
    job. The parameters are complete until `divide` is called.
    """

    def __init__(self, blocks: Sequence[Sequence[Bucket]], path: str, processes: Processes) -> None:
        self._blocks = blocks
        self._path = path
        self._processes = processes
        self._shares: list[list[Tensor]] = []
        """The pieces of this process: by block, then by bucket."""
        self._received: list[list[Tensor]] = []
        """Where the shares of all processes are received: by block, then by bucket."""
        self._complete: list[list[Tensor]] = []
        """Where parameters are complete, flat: by block, then by parameter."""
        self._exchanges: list[Exchange] = []
        self._present: int | None = None
        """The block whose parameters are complete."""
        self._coming: int | None = None
        """The block whose shares are received."""
        self._absent_values: dict[torch.dtype, Tensor] = {}
        self._used: set[nn.Parameter] = set()
        """The pieces that have got a gradient in this step."""

    @torch.no_grad()
    def divide(self) -> None:
        """Keep the pieces of this process and free the complete parameters."""
        with scope("adapter"):
            for block, buckets in enumerate(self._blocks):
                self._shares.append([_own_share(bucket) for bucket in buckets])
                self._free(block)
            size = self._processes.size
            received = [[(size * s.numel(), s.dtype) for s in own] for own in self._shares]
            complete = [
                [(parameter.numel(), parameter.dtype) for parameter in self._parameters(block)]
                for block in range(len(self._blocks))
            ]
            device = next(share.device for own in self._shares for share in own)
            self._received = _views(received, device)
            self._complete = _views(complete, device)

    def enter(self, block: int, following: int) -> None:
        """Complete the parameters of a block before it computes, and begin to exchange the next.

        following: the block that probably computes next; it may be none of the sharded ones.
        """
        if self._present != block:
            self._begin(block)
            self._finish()
        if 0 <= following < len(self._blocks):
            self._begin(following)

    def leave(self, block: int | None = None) -> None:
        """Add up the gradients of the block that was complete, if its backward pass is over.

        block: the one that computes next; None after the last one.
        """
        last = self._present
        if last is None or last == block:
            return
        if any(parameter.grad is not None for parameter in self._parameters(last)):
            for bucket in self._blocks[last]:
                self._add_gradients(bucket)

    def _add_gradients(self, bucket: Bucket) -> None:
        """Add the share of the gradients of all processes to those of the pieces."""
        pairs = zip(bucket.pieces, bucket.parameters, strict=True)
        self._used |= {piece for piece, whole in pairs if whole.grad is not None and piece.numel()}
        share = bucket.added_gradients(self._processes)
        parts = list(bucket.own_parts(share))
        earlier = [piece.grad for piece in bucket.pieces if piece.grad is not None]
        if earlier:
            torch._foreach_add_(earlier, parts)
            return
        for piece, part in zip(bucket.pieces, parts, strict=True):
            piece.grad = part

    @property
    def used(self) -> set[nn.Parameter]:
        """The pieces that have got a gradient since the last call of `forget_gradients`."""
        return self._used

    def forget_gradients(self) -> None:
        """Begin a step: no piece has got a gradient."""
        self._used = set()

    def release(self) -> None:
        """Free the complete parameters, because the pieces change or other blocks run."""
        self._wait()
        self._coming = None
        if self._present is not None:
            self._free(self._present)
        self._present = None

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Complete all parameters of the main process inside the block, in host memory.

        All processes call this together.
        """
        self.release()
        copies: list[tuple[nn.Parameter, Tensor]] = []
        for block in range(len(self._blocks)):
            with scope("adapter"), module_scope(f"{self._path}.{block}"):
                self._begin(block)
                self._finish()
                if self._processes.is_main:
                    copies += [(p, host_copy(p.detach())) for p in self._parameters(block)]
        self.release()
        for parameter, copy in copies:
            parameter.data = copy
        del copies
        try:
            yield
        finally:
            for block in range(len(self._blocks)):
                self._free(block)

    def _begin(self, block: int) -> None:
        """Begin to exchange the pieces of a block, unless that was done."""
        if self._coming == block:
            return
        self._wait()
        with unallocated():
            for complete, own in zip(self._received[block], self._shares[block], strict=True):
                exchange = self._processes.gather_parts(complete, own)
                if exchange is not None:
                    self._exchanges.append(exchange)
        self._coming = block

    def _wait(self) -> None:
        """Wait for the exchange that was begun last."""
        for exchange in self._exchanges:
            exchange.wait()
        self._exchanges = []

    @torch.no_grad()
    def _finish(self) -> None:
        """Complete the parameters of the block that was received, in place of another one's."""
        self._wait()
        block, self._coming = self._coming, None
        assert block is not None
        if self._present is not None:
            self._free(self._present)
        self._present = block
        values = iter(self._complete[block])
        for bucket, received in zip(self._blocks[block], self._received[block], strict=True):
            own = [next(values) for _ in bucket.parameters]
            copy_pairs((value, part) for part, value in bucket.pairs(received, own))
            for parameter, value in zip(bucket.parameters, own, strict=True):
                parameter.data = value.view(parameter.shape)

    def _free(self, block: int) -> None:
        """Let the parameters of a block have no memory of their own."""
        with unallocated():
            for parameter in self._parameters(block):
                parameter.data = self._absent(parameter).expand(parameter.shape)

    def _absent(self, parameter: nn.Parameter) -> Tensor:
        """Return the value of parameters that are not complete, one for all of a dtype."""
        dtype = parameter.dtype
        if dtype not in self._absent_values:
            value = torch.full((), math.nan, dtype=dtype, device=parameter.device)
            self._absent_values[dtype] = value
        return self._absent_values[dtype]

    def _parameters(self, block: int) -> list[nn.Parameter]:
        return [parameter for bucket in self._blocks[block] for parameter in bucket.parameters]


def _own_share(bucket: Bucket) -> Tensor:
    """Return a tensor of its own with the pieces of this process, which become parts of it."""
    share = bucket.parameters[0].new_zeros(bucket.num_values)
    parts = list(bucket.own_parts(share))
    copy_pairs(zip(parts, bucket.pieces, strict=True))
    for piece, part in zip(bucket.pieces, parts, strict=True):
        piece.data = part
    return share


def _views(layouts: Sequence[_Layout], device: torch.device) -> list[list[Tensor]]:
    """Return the tensors of each block in one buffer, which is as large as the largest block.

    layouts: of each block.
    """
    sizes = [[aligned(n * dtype.itemsize) for n, dtype in layout] for layout in layouts]
    buffer = torch.empty(max(map(sum, sizes)), dtype=torch.uint8, device=device)
    found = []
    for layout, own in zip(layouts, sizes, strict=True):
        parts = buffer[: sum(own)].split(own)
        found.append(
            [
                part[: n * dtype.itemsize].view(dtype)
                for part, (n, dtype) in zip(parts, layout, strict=True)
            ]
        )
    return found
