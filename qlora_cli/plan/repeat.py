"""Extends the recording of a few blocks to a model of any depth.

The transformer blocks of a model are alike. A dry run therefore runs only a few of them: the first,
the last, one to repeat and its neighbour. `repeat` extends the recording: the events of the
repeated block are copied for every block that was left out, and each copy has storages of its own.
`repeat` first checks that this is valid: the repeated block and its neighbour must have the same
events with the same sizes, and the events must refer to each other's storages in the same way.
Otherwise it raises NotAlike, and the planner runs all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

from qlora_cli.plan.recording import BlockSegment, Event, StorageId


class NotAlike(Exception):
    """The blocks to repeat have different events, so none of them can be repeated."""


def repeat(segments: list[BlockSegment], repeated: int, num_added: int) -> list[BlockSegment]:
    """Return the recording with `num_added` more blocks after the block `repeated`.

    The next block is its neighbour, with which it is compared. Raises NotAlike if the two do not
    have the same events.
    """
    assert num_added >= 0, num_added
    neighbours = _matching_segments(segments, repeated)
    extended: list[BlockSegment] = []
    for index, segment in enumerate(segments):
        if segment.block != repeated:
            extended.append(_moved(segment, repeated, num_added))
            continue
        neighbour = neighbours[segment.number]
        copies = [_copy(segment, neighbour, shift, num_added) for shift in range(num_added + 1)]
        extended += copies if _is_ascending(segments, index) else reversed(copies)
    return extended


def _matching_segments(segments: list[BlockSegment], repeated: int) -> list[BlockSegment]:
    """Return the segments of the repeated block's neighbour.

    Raises NotAlike if they differ from the segments of the repeated block.
    """
    own, neighbours = (
        [segment for segment in segments if segment.block == block]
        for block in (repeated, repeated + 1)
    )
    if [len(segment.events) for segment in own] != [len(s.events) for s in neighbours]:
        raise NotAlike
    events = (event for segment in segments for event in segment.events)
    sizes = {event.storage: event.num_bytes for event in events if event.kind == "allocate"}
    for segment, neighbour in zip(own, neighbours, strict=True):
        for event, match in zip(segment.events, neighbour.events, strict=True):
            is_same = event[0] == match[0] and event[2:] == match[2:]
            if not is_same or not _correspond(event.storage, match.storage, repeated, sizes):
                raise NotAlike
    return neighbours


def _correspond(
    storage: StorageId | None,
    match: StorageId | None,
    repeated: int,
    sizes: Mapping[StorageId | None, int],
) -> bool:
    """Return whether an event of the repeated block and its match refer to corresponding storages.

    They do if both refer to the same storage, or to storages of adjacent blocks at the same
    position. The blocks around these two have other segments, so their storages are compared by
    size.
    """
    if storage == match or storage is None or match is None:
        return storage == match
    if storage.block is None or match.block is None or storage.block + 1 != match.block:
        return False
    if storage.block == repeated:
        return storage[1:] == match[1:]
    return sizes[storage] == sizes[match]


def _is_ascending(segments: list[BlockSegment], index: int) -> bool:
    """Return whether the blocks run from the first to the last around segment `index`.

    In the backward pass they run in the opposite order. Raises NotAlike if the segment is not
    between the two adjacent blocks.
    """
    repeated = segments[index].block
    assert repeated is not None
    before = segments[index - 1].block if index else None
    after = segments[index + 1].block if index + 1 < len(segments) else None
    if repeated - 1 in (before, after) and repeated + 1 in (before, after):
        return before == repeated - 1
    raise NotAlike


def _moved(segment: BlockSegment, repeated: int, num_added: int) -> BlockSegment:
    """Return a segment that is not repeated, with the block numbers of the longer model."""

    def moved_block(block: int | None) -> int | None:
        """Return the new number of a block that the segment's events refer to."""
        if block is None or block < repeated:
            return block
        if block > repeated:
            return block + num_added
        # The repeated block became `num_added + 1` blocks: the segment refers to the nearest one.
        if segment.block == repeated - 1:
            return block
        if segment.block == repeated + 1:
            return block + num_added
        raise NotAlike

    events = [
        event
        if event.storage is None
        else _with_storage(event, moved_block(event.storage.block), event.storage)
        for event in segment.events
    ]
    block = segment.block
    if block is not None and block >= repeated:
        block += num_added
    return BlockSegment(block, segment.number, events)


def _copy(
    segment: BlockSegment, neighbour: BlockSegment, shift: int, num_added: int
) -> BlockSegment:
    """Return the repeated block's segment as the segment of the block `shift` blocks later.

    neighbour: the same segment of the next block. It identifies the storages of the previous block.
    """
    repeated = segment.block
    assert repeated is not None
    events = []
    for event, match in zip(segment.events, neighbour.events, strict=True):
        storage, other = event.storage, match.storage
        if storage is not None and other is not None and storage.block is not None:
            if storage == other:  # Both blocks use this storage. It belongs to no repeated block.
                moved = storage.block + (num_added if storage.block > repeated else 0)
                event = _with_storage(event, moved, storage)
            elif storage.block >= repeated:
                event = _with_storage(event, storage.block + shift, storage)
            elif shift:  # A storage of the previous block, which is a copy itself.
                event = _with_storage(event, storage.block + shift, other)
        events.append(event)
    return BlockSegment(repeated + shift, segment.number, events)


def _with_storage(event: Event, block: int | None, storage: StorageId) -> Event:
    """Return the event for the storage at the same position of another block."""
    return Event(event[0], StorageId(block, storage[1], storage[2]), event[2], event[3])
