"""Records the tracker's events by block, and plays them to another listener.

`repeat.py` extends a recording of a few blocks to a model of any depth. A block may stand for a
group of consecutive blocks (`block_groups.py`).

Which block an event belongs to: the block that is active (`enter_module`), else the block of the
storage that the event is about, else the block of the previous event. Consecutive events of one
block form a `BlockSegment`.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from qlora_cli.memory.listener import MemoryListener
from qlora_cli.memory.work import Work


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

    kind: allocate, free, recategorize, begin, end, release, mark, work or recompute, which is work
    that a recomputed block does a second time. category: the storage's category; for `end` the name
    of the phase, for `mark` of the part of the step, for work its kind. num_bytes: of the storage,
    or those that work reads and writes. flops: of work.
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
        kind = "recompute" if work.recomputed else "work"
        self._append(Event(kind, None, work.num_bytes, work.kind, work.flops), None)

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
            elif kind == "mark":
                listener.mark(category)
            elif kind == "release":
                listener.release_cache()
        after_segment(segment)
