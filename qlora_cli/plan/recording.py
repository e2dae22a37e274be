"""What the tracker saw, kept in order; a plan repeats in it the blocks that it did not imagine.

Blocks of a model are alike. A plan imagines a few, and its recording is drawn out to the true
number: the events that belong to one block in the middle are repeated for every block left out,
each copy with storages of its own. That this may be done is not assumed: the block and its
neighbour must have left the same events, with the same sizes, that refer to each other's storages
in the same way; otherwise `repeat` raises NotAlike and the plan imagines all blocks.

An event belongs to the block that is at work (`enter`), else to the block of the storage that it
works on, else to the same block as the event before it. Events of one block in a row are a visit.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from qlora_cli.memory.listener import MemoryListener

NUM_RECORDED_BLOCKS = 4
"""Blocks that are imagined: the first, the last, one that is repeated, one to compare it with."""
_REPEATED = 1
"""The block whose events are repeated."""


class NotAlike(Exception):
    """The blocks left different events; nothing can be repeated."""


class StorageId(NamedTuple):
    """A storage, named by where it was made.

    block: None before the first block. visit: the how manyth of that block. place: within it.
    """

    block: int | None
    visit: int
    place: int


class Event(NamedTuple):
    """kind: allocate | free | recategorize | begin | end | release. category: or a phase's name."""

    kind: str
    storage: StorageId | None = None
    num_bytes: int = 0
    category: str = ""


@dataclass
class BlockSegment:
    """Events in a row that belong to one block."""

    block: int | None
    number: int
    events: list[Event] = field(default_factory=list)


class Recording:
    """A sink of the tracker."""

    def __init__(self) -> None:
        self.visits: list[BlockSegment] = []
        self.blocks = ""
        """Path of the block list, `model.layers`; empty until the model's family is known."""
        self._block: int | None = None
        self._births: dict[Hashable, StorageId] = {}
        self._numbers: Tally[int | None] = Tally()

    def enter_module(self, path: str) -> None:
        """What follows belongs to the block that `path` leads into, if it leads into one."""
        prefix = f"{self.blocks}."
        index = path.removeprefix(prefix).split(".")[0] if path.startswith(prefix) else ""
        self._block = int(index) if index.isdigit() else None

    def begin_phase(self) -> None:
        """A phase begins."""
        self.enter_module("")
        self._note(Event("begin"), None)

    def end_phase(self, name: str) -> None:
        """The phase that began last was `name`."""
        self.enter_module("")
        self._note(Event("end", category=name), None)

    def release_cache(self) -> None:
        """Unused segments go back to the device."""
        self._note(Event("release"), None)

    def mark(self, name: str) -> None:
        """A part of a step begins; no block is at work yet."""
        self.enter_module("")

    def allocate(
        self, key: Hashable, num_bytes: int, category: str, origin: Hashable = None
    ) -> None:
        """A storage is made."""
        known = self._births.get(origin)
        visit = self._visit(known.block if known else None)
        birth = StorageId(visit.block, visit.number, len(visit.events))
        self._births[key] = birth
        visit.events.append(Event("allocate", birth, num_bytes, category))

    def free(self, key: Hashable) -> None:
        """It is gone."""
        birth = self._births.pop(key)
        self._note(Event("free", birth), birth.block)

    def recategorize(self, key: Hashable, category: str) -> None:
        """It belongs to `category` from now on."""
        birth = self._births[key]
        self._note(Event("recategorize", birth, 0, category), birth.block)

    def _note(self, event: Event, block: int | None) -> None:
        self._visit(block).events.append(event)

    def _visit(self, block: int | None) -> BlockSegment:
        """The visit an event belongs to; block: of the storage it works on, where known."""
        if self._block is not None:
            block = self._block
        last = self.visits[-1] if self.visits else None
        if last is not None and block in (None, last.block):
            return last
        visit = BlockSegment(block, self._numbers[block])
        self._numbers[block] += 1
        self.visits.append(visit)
        return visit


def play(
    visits: Iterable[BlockSegment],
    account: MemoryListener,
    after: Callable[[BlockSegment], None] = lambda _: None,
) -> None:
    """Gives every event to an account, in order. after: called when a visit has been played."""
    for visit in visits:
        for kind, storage, num_bytes, category in visit.events:
            if kind == "allocate":
                account.allocate(storage, num_bytes, category)
            elif kind == "free":
                account.free(storage)
            elif kind == "recategorize":
                account.recategorize(storage, category)
            elif kind == "begin":
                account.begin_phase()
            elif kind == "end":
                account.end_phase(category)
            else:
                account.release_cache()
        after(visit)


def repeat(visits: list[BlockSegment], num_blocks: int) -> list[BlockSegment]:
    """The recording of a model of `NUM_RECORDED_BLOCKS` blocks as that of one of `num_blocks`.

    Raises NotAlike where the blocks in the middle did not leave the same events.
    """
    more = num_blocks - NUM_RECORDED_BLOCKS
    assert more >= 0, num_blocks
    pairs = _alike(visits)
    drawn_out: list[BlockSegment] = []
    for index, visit in enumerate(visits):
        if visit.block != _REPEATED:
            drawn_out.append(_moved(visit, more))
            continue
        copies = [_copy(visit, pairs[visit.number], shift, more) for shift in range(more + 1)]
        drawn_out += copies if _rises(visits, index) else reversed(copies)
    return drawn_out


def _alike(visits: list[BlockSegment]) -> list[BlockSegment]:
    """The visits of the next block, after they were found to be like those of the repeated one."""
    mine, others = (
        [visit for visit in visits if visit.block == block] for block in (_REPEATED, _REPEATED + 1)
    )
    if [len(visit.events) for visit in mine] != [len(visit.events) for visit in others]:
        raise NotAlike
    events = (event for visit in visits for event in visit.events)
    sizes = {event.storage: event.num_bytes for event in events if event.kind == "allocate"}
    for one, other in zip(mine, others, strict=True):
        for event, fellow in zip(one.events, other.events, strict=True):
            same = event[0] == fellow[0] and event[2:] == fellow[2:]
            if not same or not _correspond(event.storage, fellow.storage, sizes):
                raise NotAlike
    return others


def _correspond(
    mine: StorageId | None, other: StorageId | None, sizes: Mapping[StorageId | None, int]
) -> bool:
    """Whether the two are the same storage, or the same of a block as far away.

    The first and the last block are visited at other times, so a neighbour's is known by its size.
    """
    if mine == other or mine is None or other is None:
        return mine == other
    if mine.block is None or other.block is None or mine.block + 1 != other.block:
        return False
    own = mine.block == _REPEATED
    return mine[1:] == other[1:] if own else sizes[mine] == sizes[other]


def _rises(visits: list[BlockSegment], index: int) -> bool:
    """Whether the visits go from the first block to the last here."""
    before = visits[index - 1].block if index else None
    after = visits[index + 1].block if index + 1 < len(visits) else None
    if _REPEATED - 1 in (before, after) and _REPEATED + 1 in (before, after):
        return before == _REPEATED - 1
    raise NotAlike


def _moved(visit: BlockSegment, more: int) -> BlockSegment:
    """A visit of a block that is not repeated, at its place in the longer model."""

    def place(block: int | None) -> int | None:
        """Where a block that the visit refers to has gone."""
        if block is None or block < _REPEATED:
            return block
        if block > _REPEATED:
            return block + more
        if visit.block == _REPEATED - 1:
            return block
        if visit.block == _REPEATED + 1:
            return block + more
        raise NotAlike

    events = [
        event if event.storage is None else _of(event, place(event.storage.block), event.storage)
        for event in visit.events
    ]
    block = visit.block if visit.block is None or visit.block < _REPEATED else visit.block + more
    return BlockSegment(block, visit.number, events)


def _copy(visit: BlockSegment, fellow: BlockSegment, shift: int, more: int) -> BlockSegment:
    """The repeated block's visit as that of the block `shift` further on."""
    events = []
    for event, other in zip(visit.events, fellow.events, strict=True):
        storage, others = event.storage, other.storage
        if storage is not None and others is not None and storage.block is not None:
            if storage == others:
                event = _of(
                    event, storage.block + (more if storage.block > _REPEATED else 0), storage
                )
            elif storage.block >= _REPEATED:
                event = _of(event, storage.block + shift, storage)
            elif shift:
                # Of the block before, which is a copy too; the fellow names what that one made.
                event = _of(event, storage.block + shift, others)
        events.append(event)
    return BlockSegment(_REPEATED + shift, visit.number, events)


def _of(event: Event, block: int | None, storage: StorageId) -> Event:
    """The event on the storage's like in another block."""
    return Event(event[0], StorageId(block, storage[1], storage[2]), event[2], event[3])
