"""A model of torch's CUDA caching allocator: blocks, segments, rounding, splitting, the limit.

A sum of tensor sizes is not enough to plan a GPU job. "allocated" counts complete blocks, and a
large block is not split if less than 1 MiB would remain. "reserved" counts segments, which a
sequence of allocations can fragment. A sum of tensors is up to 3 % below "allocated" and does not
determine "reserved", so it would promise sequences that are 5 to 18 % longer than the GPU can hold.
Replaying the real allocator's events with this model gives the real allocator's figures exactly
(tools/validation/plan_vs_run.py).

Source: c10/cuda/CUDACachingAllocator.cpp, without expandable segments, one stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass

from qlora_cli.units import MIB

GRANULARITY = 512
"""Sizes are rounded up to a multiple of this."""
_SMALL = MIB
"""Largest request, in bytes, that is served from the pool of small blocks."""
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
"""Segment size for requests below `_OWN_SEGMENT`. A larger request gets a segment of its own size,
rounded up to 2 MiB."""
_OWN_SEGMENT = 10 * MIB
_ROUND_SEGMENT = 2 * MIB
_MIN_REMAINDER = MIB
"""A large block is split only if more than this remains."""


class OutOfMemory(Exception):
    """Raised if the limit is reached although all unused segments were returned to the device."""


@dataclass(eq=False, slots=True)
class _Block:
    """A part of a segment. before, after: the adjacent blocks of the same segment."""

    address: int
    size: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """Assigns blocks to storages by key.

    limit: highest number of reserved bytes; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self._blocks: dict[Hashable, _Block] = {}
        self._pools: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._next_address = 0

    def allocate(self, key: Hashable, num_bytes: int) -> int:
        """Return the size in bytes of the block that the request receives.

        Raises OutOfMemory if a new segment would exceed the limit.
        """
        if not num_bytes:
            return 0
        size = -(-num_bytes // GRANULARITY) * GRANULARITY
        small = size <= _SMALL
        block = self._find(size, small) or self._new_segment(size, small)
        remainder = block.size - size
        if remainder >= GRANULARITY if small else remainder > _MIN_REMAINDER:
            self._split(block, size)
        block.free = False
        self._blocks[key] = block
        return block.size

    def free(self, key: Hashable) -> None:
        """Join the block with its free neighbours and keep it for later requests."""
        block = self._blocks.pop(key, None)
        if block is None:  # The storage was empty.
            return
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take(neighbour)
                block = _joined(block, neighbour)
        block.free = True
        insort(self._pools[block.small], (block.size, block.address, block))

    def release_cache(self) -> None:
        """Return segments without a used block to the device, as `torch.cuda.empty_cache` does."""
        for small, pool in self._pools.items():
            unused = [item for item in pool if item[2].before is None and item[2].after is None]
            self.reserved_bytes -= sum(size for size, _, _ in unused)
            removed = {id(block) for _, _, block in unused}
            self._pools[small] = [item for item in pool if id(item[2]) not in removed]

    def _find(self, size: int, small: bool) -> _Block | None:
        """Return the smallest free block that is large enough, or None.

        Of several blocks of that size it is the one with the lowest address.
        """
        pool = self._pools[small]
        index = bisect_left(pool, (size, -1))
        return pool.pop(index)[2] if index < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> _Block:
        segment = _segment_bytes(size, small)
        if self.limit is not None and self.reserved_bytes + segment > self.limit:
            self.release_cache()
            if self.reserved_bytes + segment > self.limit:
                raise OutOfMemory
        block = _Block(self._next_address, segment, small)
        self._next_address += segment
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(
            block.address + size, block.size - size, block.small, True, block, block.after
        )
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        insort(self._pools[block.small], (rest.size, rest.address, rest))

    def _take(self, block: _Block) -> None:
        pool = self._pools[block.small]
        pool.pop(bisect_left(pool, (block.size, block.address)))


def _segment_bytes(size: int, small: bool) -> int:
    if small:
        return _SMALL_SEGMENT
    if size < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT


def _joined(block: _Block, neighbour: _Block) -> _Block:
    """Return two adjacent blocks as one."""
    first, second = sorted((block, neighbour), key=lambda part: part.address)
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
