"""Shards the packed weights of the first blocks over the processes of a job.

Each process keeps an equal part of the bytes of each block. Before a block computes, in the forward
pass and again when it is recomputed in the backward pass, all processes exchange their parts, so
that each has the complete block in one of two buffers. The parts of the next block are exchanged
meanwhile. `block_stream.py` describes how the buffers are used.

All processes must run the same blocks in the same order. torch's `fully_shard` is not used: it
casts and frees parameters by itself, and the scales of a packed weight are of several dtypes. One
buffer of bytes per block needs one exchange, and the same code runs in the dry run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_cli.events import Observer
from qlora_cli.files.source import TensorSource
from qlora_cli.memory.scopes import attribute, host_memory, module_scope, scope, unallocated
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.block_stream import BlockStream, Slots, streamed_slots
from qlora_cli.models.placement.device import complete, loading_order
from qlora_cli.models.placement.held import (
    PackedCopy,
    held_specs,
    held_tensors,
    put_held,
    put_tensor,
)
from qlora_cli.models.placement.slots import TensorSlot, checked_slots
from qlora_cli.models.placement.weight_store import aligned
from qlora_cli.nn.packed_tensors import drop_packed
from qlora_cli.parallel.processes import Processes


class _Parts:
    """The store of a sharded base: `BlockShards` exchanges the weights itself."""

    where = "in parts on all devices"

    def copy(self, targets: Mapping[str, Tensor]) -> None:
        """Do nothing: the exchange fills a buffer."""

    def will_need(self, names: Iterator[str]) -> None:
        """Do nothing: the next block is exchanged, and none after it."""


class TrainedParameters(Protocol):
    """The trained parameters of sharded blocks, of which each process keeps a part, too."""

    def leave(self, block: int | None) -> None:
        """End the work of the block that computed last. block: the one that computes next."""

    def enter(self, block: int, following: int) -> None:
        """Complete the parameters of a block, and begin to exchange those of the following one."""


class BlockShards(BlockStream):
    """Gives the first blocks of a model their weights, of which each process keeps a part.

    blocks: the slots of packed weights of each sharded block. device: the one that computes.
    processes: those of the job.
    """

    def __init__(self, blocks: Sequence[Slots], device: torch.device, processes: Processes) -> None:
        super().__init__(blocks, device, _Parts())
        self.trained: TrainedParameters | None = None
        """Those of the blocks; None if they are always complete."""
        self._processes = processes
        self._shards: dict[int, Tensor] = {}
        """Block -> the bytes of it that this process keeps, on the device."""
        self._exchanges: dict[int, Any] = {}
        """Blocks that are on their way -> the exchange, whose end is waited for."""
        self._places = {
            name: (block, start)
            for block, slots in enumerate(blocks)
            for name, start in _starts(slots)
        }

    @property
    def shard_bytes(self) -> list[int]:
        """Return the bytes of each block that one process keeps."""
        return [aligned(-(-size // self._processes.size)) for size in self.block_bytes]

    def keep(self, name: str, slot: TensorSlot) -> None:
        """Keep this process' part of the weights of a slot that was just filled."""
        self._keep(name, slot, dict(held_tensors({name: slot})))
        for linear in slot.linears:
            drop_packed(linear)

    def load(self, name: str, slot: TensorSlot, copy: PackedCopy | None) -> bool:
        """Keep this process' part of the weights in a packed copy. Return False if it has none.

        The copy is mapped into memory, so only this part is copied to the device.
        """
        with host_memory():
            tensors = copy.read(held_specs(name, slot)) if copy is not None else None
        if tensors is None:
            return False
        self._keep(name, slot, tensors)
        for linear in slot.linears:
            drop_packed(linear)
        return True

    def _keep(self, name: str, slot: TensorSlot, tensors: Any) -> None:
        block, start = self._places[name]
        shard = self._shard(block)
        first = self._processes.rank * len(shard)
        for key, spec in held_specs(name, slot).items():
            begin = max(start, first)
            end = min(start + spec.num_bytes, first + len(shard))
            if begin < end:
                own = tensors[key].reshape(-1).view(torch.uint8)[begin - start : end - start]
                with unallocated():
                    shard[begin - first : end - first].copy_(own)
            start += aligned(spec.num_bytes)

    def _shard(self, block: int) -> Tensor:
        """Return the bytes of a block that this process keeps, which are allocated once."""
        if block not in self._shards:
            with scope("base"):
                size = self.shard_bytes[block]
                self._shards[block] = torch.zeros(size, dtype=torch.uint8, device=self.device)
            attribute([self._shards[block]], "base")
        return self._shards[block]

    @property
    def _buffer_bytes(self) -> int:
        """Return the size of a buffer, which must hold the parts of all processes."""
        return max(self.shard_bytes) * self._processes.size

    def acquire(self, block: int) -> None:
        """Wait until the weights of a block are here, and begin to exchange the next."""
        if self.trained is not None:
            self.trained.leave(block)
        super().acquire(block)
        self._wait(block)
        if self.trained is not None and block < self.num_blocks:
            self.trained.enter(block, self.following)

    def _wait(self, block: int) -> None:
        exchange = self._exchanges.pop(block, None)
        if exchange is not None:
            exchange.wait()

    def _drop(self, block: int) -> None:
        self._wait(block)
        super()._drop(block)

    def _copy(self, block: int) -> None:
        """Begin to exchange the parts of a block. The exchange follows all operations before."""
        parts = self._parts(block)
        shard = self._shards[block]
        buffer = self._buffers[block % len(self._buffers)]
        with unallocated():
            complete_block = buffer[: len(shard) * self._processes.size]
            self._exchanges[block] = self._processes.gather_parts(complete_block, shard)
        for name, slot in self._blocks[block].items():
            put_held(name, slot, parts[name], counted=False)


def _starts(slots: Slots) -> Iterator[tuple[str, int]]:
    """Yield the name of each slot and its first byte in the buffer of its block."""
    start = 0
    for name, slot in slots.items():
        yield name, start
        start += sum(aligned(spec.num_bytes) for spec in held_specs(name, slot).values())


@dataclass(frozen=True)
class ShardedPlacement:
    """Placement of a model whose first blocks are sharded over the processes of a job.

    The other tensors are on the device of each process. observer: receives the progress of
    loading. copy: of the packed base, which is read if it exists and never written. num_sharded:
    number of sharded blocks.
    """

    device: torch.device
    observer: Observer
    copy: PackedCopy | None
    num_sharded: int
    processes: Processes

    def place(self, loaded: LoadedModel, source: TensorSource) -> None:
        """Load this process' part of the model. Raises ModelError if the source does not fit."""
        slots = checked_slots(loaded, source)
        self.observer.stage("load", len(slots))
        blocks = streamed_slots(slots, loaded.family.blocks, self.num_sharded)
        loaded.stream = shards = BlockShards(blocks, self.device, self.processes)
        heads = loaded.family.classifier.shapes
        num_copied = 0
        for done, name in enumerate(loading_order(slots, loaded.family.blocks), 1):
            slot = slots[name]
            with scope("temporary"), module_scope(slot.module or name):
                if name in shards.names and shards.load(name, slot, self.copy):
                    num_copied += 1
                else:
                    copy = None if name in heads else self.copy
                    num_copied += put_tensor(name, slot, source, copy, self.device)
                    if name in shards.names:
                        shards.keep(name, slot)
            self.observer.advance(done)
        complete(loaded, source, self.device, is_compared=num_copied == len(slots))
