"""Keeps the packed weights of the first blocks in host memory or on disk, and streams them.

The device has two buffers. One holds the weights of the block that computes; the weights of the
next block are copied to the other one meanwhile. A block that is streamed is also recomputed in the
backward pass (`nn/activation_policy.py`), and its products save no weight, so nothing of it is
needed between the two passes. The backward pass of a block ends before the one before it is
recomputed. A product of a linear whose weights are not on the device is an error.

A copy to a buffer waits for everything that was queued on the computing stream before, which are
the operations of the block that used the buffer. The dry run calls the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qlora_cli.memory.scopes import attribute, scope, unallocated
from qlora_cli.models.placement.held import held_specs, put_held
from qlora_cli.models.placement.slots import TensorSlot
from qlora_cli.models.placement.weight_store import NUM_BUFFERS, WeightStore, aligned
from qlora_cli.nn.packed_tensors import drop_packed

Slots = Mapping[str, TensorSlot]
"""Name of a tensor in the checkpoint -> its destination."""


class BlockStream:
    """Gives the first blocks of a model their weights when they compute.

    blocks: the slots of packed weights of each streamed block. device: the one that computes.
    weights: has them while they are not in a buffer.
    """

    def __init__(self, blocks: Sequence[Slots], device: torch.device, weights: WeightStore) -> None:
        self.device = device
        self.weights = weights
        self._blocks = blocks
        self._buffers: list[Tensor] = []
        self._arrivals: dict[int, torch.cuda.Event | None] = {}
        """The blocks whose weights are in a buffer or on their way -> end of the copy."""
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = 0
        self._is_ascending = True

    @property
    def num_blocks(self) -> int:
        """Return the number of streamed blocks, which are the first ones."""
        return len(self._blocks)

    @property
    def names(self) -> set[str]:
        """Return the names of the tensors that are streamed."""
        return {name for slots in self._blocks for name in slots}

    @property
    def block_bytes(self) -> list[int]:
        """Return the bytes of the weights of each streamed block."""
        return [_size(slots) for slots in self._blocks]

    def allocate_buffers(self) -> None:
        """Allocate the buffers on the device; the weights of all blocks were moved before."""
        with scope("base"):
            self._buffers = [
                torch.empty(self._buffer_bytes, dtype=torch.uint8, device=self.device)
                for _ in range(min(NUM_BUFFERS, self.num_blocks))
            ]
        attribute(self._buffers, "base")

    @property
    def _buffer_bytes(self) -> int:
        """Return the size of a buffer, which must hold the largest block."""
        return max(self.block_bytes)

    def acquire(self, block: int) -> None:
        """Put the weights of a block on the device before it computes, and begin to copy the next.

        block: index of the block. Blocks that are not streamed have their weights always.
        """
        if block >= self.num_blocks:
            return
        self._turn(block)
        following = self.following
        for other in [b for b in self._arrivals if b not in (block, following)]:
            self._drop(other)
        for wanted in (block, following):
            if 0 <= wanted < self.num_blocks and wanted not in self._arrivals:
                self._arrivals[wanted] = self._copy(wanted)
        later = 2 * following - block
        if 0 <= later < self.num_blocks and later not in self._arrivals:
            slots = self._blocks[later].items()
            self.weights.will_need(key for name, slot in slots for key in held_specs(name, slot))
        arrival = self._arrivals[block]
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def _turn(self, block: int) -> None:
        """Remember the direction in which blocks compute. block: the one that computes now.

        At both ends the direction turns, and the neighbour's weights are there already.
        """
        if block in (0, self.num_blocks - 1):
            self._is_ascending = block == 0
        elif block != self._last:
            self._is_ascending = block > self._last
        self._last = block

    @property
    def following(self) -> int:
        """Return the block that probably computes next."""
        return self._last + 1 if self._is_ascending else self._last - 1

    def _drop(self, block: int) -> None:
        del self._arrivals[block]
        for slot in self._blocks[block].values():
            for linear in slot.linears:
                drop_packed(linear)

    def _copy(self, block: int) -> torch.cuda.Event | None:
        """Copy the weights of a block to its buffer. Return the end of the copy on a GPU."""
        parts = self._parts(block)
        arrival = None
        if self._copies is None:
            self._fill(parts)
        else:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._copies):
                self._fill(parts)
            arrival = self._copies.record_event()
        for name, slot in self._blocks[block].items():
            put_held(name, slot, parts[name], counted=False)
        return arrival

    def _fill(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        with unallocated():  # The link between the memories copies, and not the device's kernels.
            self.weights.copy({key: part for own in parts.values() for key, part in own.items()})

    def _parts(self, block: int) -> dict[str, dict[str, Tensor]]:
        """Return the parts of a block's buffer that hold its tensors: by slot, then by name."""
        buffer = self._buffers[block % len(self._buffers)]
        parts: dict[str, dict[str, Tensor]] = {}
        start = 0
        for name, slot in self._blocks[block].items():
            parts[name] = {}
            for key, spec in held_specs(name, slot).items():
                part = buffer[start : start + spec.num_bytes]
                parts[name][key] = part.view(spec.dtype).view(spec.shape)
                start += aligned(spec.num_bytes)
        return parts


def streamed_slots(slots: Slots, blocks: str, num_streamed: int) -> list[dict[str, TensorSlot]]:
    """Return the slots of packed weights of each of the first blocks.

    blocks: path of the list of blocks. Norms and biases are small and stay on the device.
    """
    found: list[dict[str, TensorSlot]] = [{} for _ in range(num_streamed)]
    for name, slot in slots.items():
        index = (slot.module or name).removeprefix(f"{blocks}.").partition(".")[0]
        if slot.linears and name.startswith(f"{blocks}.") and int(index) < num_streamed:
            found[int(index)][name] = slot
    return found


def _size(slots: Slots) -> int:
    """Return the bytes that the packed tensors of a block need in a buffer."""
    specs = (spec for name, slot in slots.items() for spec in held_specs(name, slot).values())
    return sum(aligned(spec.num_bytes) for spec in specs)
