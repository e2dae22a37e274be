"""Records the tracker's events, and extends the recording of a few blocks to a model of any depth.

The transformer blocks of a model are alike. A dry run therefore runs only `NUM_RECORDED_BLOCKS` of
them, and `repeat` extends the recording: the events of one middle block are copied for every block
that was left out, and each copy has storages of its own. `repeat` first checks that this is valid:
the middle block and its neighbour must have the same events with the same sizes, and the events
must refer to each other's storages in the same way. Otherwise it raises NotAlike, and the planner
runs all blocks.

A block may stand for a group of consecutive blocks (`block_groups.py`).

Which block an event belongs to: the block that is active (`enter_module`), else the block of the
storage that the event is about, else the block of the previous event. Consecutive events of one
block form a `BlockSegment`.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from qlora_cli.memory.listener import MemoryListener
from qlora_cli.memory.work import Work

NUM_RECORDED_BLOCKS = 4
"""Blocks of a dry run: the first, the last, one to repeat, and its neighbour to compare it with."""
_REPEATED = 1
"""Index of the block whose events are repeated."""


class NotAlike(Exception):
    """The middle blocks have different events, so none of them can be repeated."""


class StorageId(NamedTuple):
    """A storage, identified by the position of its allocation in the recording.

    block: index of the block that allocated it; None outside of the blocks. segment: number of the
    segment among the segments of that block. event: number of the event in that segment.
    """

    block: int | None
    segment: int
    event: int


class Event(NamedTuple):
    """One event.

    kind: allocate, free, recategorize, begin, end, release, mark or work. category: the storage's
    category; for `end` the name of the phase, for `mark` of the part of the step, for `work` the
    kind of work. num_bytes: of the storage, or those that work reads and writes. flops: of work.
    """

    kind: str
    storage: StorageId | None = None
    num_bytes: int = 0
    category: str = ""
    flops: int = 0


@dataclass
class BlockSegment:
    """Consecutive events of one block.

    block: index of the block; None outside of the blocks. number: of the segment among the segments
    of that block.
    """

    block: int | None
    number: int
    events: list[Event] = field(default_factory=list)


class Recording:
    """A `MemoryListener` that stores all events.

    group_of: returns the number that a block's events are recorded with, from the block's index.
    """

    def __init__(self, group_of: Callable[[int], int] = lambda block: block) -> None:
        self._group_of = group_of
        self.segments: list[BlockSegment] = []
        self.blocks = ""
        """Module path of the list of blocks, such as `model.layers`; "" until it is known."""
        self._active_block: int | None = None
        self._storages: dict[Hashable, StorageId] = {}
        self._num_segments: Tally[int | None] = Tally()

    def enter_module(self, path: str) -> None:
        """Make the block that contains the module at `path` active; none if it is in no block."""
        prefix = f"{self.blocks}."
        index = path.removeprefix(prefix).split(".")[0] if path.startswith(prefix) else ""
        self._active_block = self._group_of(int(index)) if index.isdigit() else None

    def begin_phase(self) -> None:
        """Record that a phase begins; no block is active."""
        self.enter_module("")
        self._append(Event("begin"), None)

    def end_phase(self, name: str) -> None:
        """Record that the phase that began last ends, and its name."""
        self.enter_module("")
        self._append(Event("end", category=name), None)

    def release_cache(self) -> None:
        """Record that unused segments return to the device."""
        self._append(Event("release"), None)

    def mark(self, name: str) -> None:
        """Record that a part of a step begins; no block is active."""
        self.enter_module("")
        self._append(Event("mark", category=name), None)

    def work(self, work: Work) -> None:
        """Record the work of an operation."""
        self._append(Event("work", None, work.num_bytes, work.kind, work.flops), None)

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        """Record a new storage."""
        source = self._storages.get(origin)
        segment = self._segment(source.block if source else None)
        storage = StorageId(segment.block, segment.number, len(segment.events))
        self._storages[key] = storage
        segment.events.append(Event("allocate", storage, num_bytes, category))

    def free(self, key: Hashable) -> None:
        """Record that the storage was freed."""
        storage = self._storages.pop(key)
        self._append(Event("free", storage), storage.block)

    def recategorize(self, key: Hashable, category: str) -> None:
        """Record that the storage counts under `category` from now on."""
        storage = self._storages[key]
        self._append(Event("recategorize", storage, 0, category), storage.block)

    def _append(self, event: Event, block: int | None) -> None:
        self._segment(block).events.append(event)

    def _segment(self, block: int | None) -> BlockSegment:
        """Return the segment of the next event. block: of its storage, or None if unknown."""
        if self._active_block is not None:
            block = self._active_block
        last = self.segments[-1] if self.segments else None
        if last is not None and block in (None, last.block):
            return last
        segment = BlockSegment(block, self._num_segments[block])
        self._num_segments[block] += 1
        self.segments.append(segment)
        return segment


def play(
    segments: Iterable[BlockSegment],
    listener: MemoryListener,
    after_segment: Callable[[BlockSegment], None] = lambda _: None,
) -> None:
    """Send every recorded event about memory to `listener`, in order.

    after_segment: called after each segment.
    """
    for segment in segments:
        for kind, storage, num_bytes, category, _ in segment.events:
            if kind == "allocate":
                listener.allocate(storage, num_bytes, category)
            elif kind == "free":
                listener.free(storage)
            elif kind == "recategorize":
                listener.recategorize(storage, category)
            elif kind == "begin":
                listener.begin_phase()
            elif kind == "end":
                listener.end_phase(category)
            elif kind == "release":
                listener.release_cache()
        after_segment(segment)


def repeat(segments: list[BlockSegment], num_blocks: int) -> list[BlockSegment]:
    """Extend the recording of `NUM_RECORDED_BLOCKS` blocks to a model of `num_blocks` blocks.

    Raises NotAlike if the middle blocks do not have the same events.
    """
    num_added = num_blocks - NUM_RECORDED_BLOCKS
    assert num_added >= 0, num_blocks
    neighbours = _matching_segments(segments)
    extended: list[BlockSegment] = []
    for index, segment in enumerate(segments):
        if segment.block != _REPEATED:
            extended.append(_moved(segment, num_added))
            continue
        neighbour = neighbours[segment.number]
        copies = [_copy(segment, neighbour, shift, num_added) for shift in range(num_added + 1)]
        extended += copies if _is_ascending(segments, index) else reversed(copies)
    return extended


def _matching_segments(segments: list[BlockSegment]) -> list[BlockSegment]:
    """Return the segments of the repeated block's neighbour.

    Raises NotAlike if they differ from the segments of the repeated block.
    """
    repeated, neighbours = (
        [segment for segment in segments if segment.block == block]
        for block in (_REPEATED, _REPEATED + 1)
    )
    if [len(segment.events) for segment in repeated] != [len(s.events) for s in neighbours]:
        raise NotAlike
    events = (event for segment in segments for event in segment.events)
    sizes = {event.storage: event.num_bytes for event in events if event.kind == "allocate"}
    for segment, neighbour in zip(repeated, neighbours, strict=True):
        for event, match in zip(segment.events, neighbour.events, strict=True):
            is_same = event[0] == match[0] and event[2:] == match[2:]
            if not is_same or not _correspond(event.storage, match.storage, sizes):
                raise NotAlike
    return neighbours


def _correspond(
    storage: StorageId | None, match: StorageId | None, sizes: Mapping[StorageId | None, int]
) -> bool:
    """Return whether an event of the repeated block and its match refer to corresponding storages.

    They do if both refer to the same storage, or to storages of adjacent blocks at the same
    position. The first and the last block have other segments than the middle ones, so their
    storages are compared by size.
    """
    if storage == match or storage is None or match is None:
        return storage == match
    if storage.block is None or match.block is None or storage.block + 1 != match.block:
        return False
    if storage.block == _REPEATED:
        return storage[1:] == match[1:]
    return sizes[storage] == sizes[match]


def _is_ascending(segments: list[BlockSegment], index: int) -> bool:
    """Return whether the blocks run from the first to the last around segment `index`.

    In the backward pass they run in the opposite order. Raises NotAlike if the segment is not
    between the two adjacent blocks.
    """
    before = segments[index - 1].block if index else None
    after = segments[index + 1].block if index + 1 < len(segments) else None
    if _REPEATED - 1 in (before, after) and _REPEATED + 1 in (before, after):
        return before == _REPEATED - 1
    raise NotAlike


def _moved(segment: BlockSegment, num_added: int) -> BlockSegment:
    """Return a segment that is not repeated, with the block numbers of the longer model."""

    def moved_block(block: int | None) -> int | None:
        """Return the new number of a block that the segment's events refer to."""
        if block is None or block < _REPEATED:
            return block
        if block > _REPEATED:
            return block + num_added
        # The repeated block became `num_added + 1` blocks: the segment refers to the nearest one.
        if segment.block == _REPEATED - 1:
            return block
        if segment.block == _REPEATED + 1:
            return block + num_added
        raise NotAlike

    events = [
        event
        if event.storage is None
        else _with_storage(event, moved_block(event.storage.block), event.storage)
        for event in segment.events
    ]
    block = segment.block
    if block is not None and block >= _REPEATED:
        block += num_added
    return BlockSegment(block, segment.number, events)


def _copy(
    segment: BlockSegment, neighbour: BlockSegment, shift: int, num_added: int
) -> BlockSegment:
    """Return the repeated block's segment as the segment of the block `shift` blocks later.

    neighbour: the same segment of the next block. It identifies the storages of the previous block.
    """
    events = []
    for event, match in zip(segment.events, neighbour.events, strict=True):
        storage, other = event.storage, match.storage
        if storage is not None and other is not None and storage.block is not None:
            if storage == other:  # Both blocks use this storage. It belongs to no repeated block.
                moved = storage.block + (num_added if storage.block > _REPEATED else 0)
                event = _with_storage(event, moved, storage)
            elif storage.block >= _REPEATED:
                event = _with_storage(event, storage.block + shift, storage)
            elif shift:  # A storage of the previous block, which is a copy itself.
                event = _with_storage(event, storage.block + shift, other)
        events.append(event)
    return BlockSegment(_REPEATED + shift, segment.number, events)


def _with_storage(event: Event, block: int | None, storage: StorageId) -> Event:
    """Return the event for the storage at the same position of another block."""
    return Event(event[0], StorageId(block, storage[1], storage[2]), event[2], event[3])
