"""The model of the caching allocator: compared with a trace of the real one, and its properties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.memory.allocator import GRANULARITY, CachingAllocator, OutOfMemory
from qlora_cli.units import MIB

TRACE = json.loads(Path(__file__).with_name("allocator_trace.json").read_text())
EVENTS = [int(word) for line in TRACE["events"] for word in line.split()]


def play(allocator: CachingAllocator, events: list[int]) -> list[list[int]]:
    """Return [index of the event, bytes reserved from then on] for each change, as in the trace."""
    reserved: list[list[int]] = []
    key = 0
    for index, event in enumerate(events):
        before = allocator.reserved_bytes
        if event > 0:
            allocator.allocate(key, event)
            key += 1
        elif event < 0:
            allocator.free(-1 - event)
        else:
            allocator.release_cache()
        if allocator.reserved_bytes != before:
            reserved.append([index, allocator.reserved_bytes])
    return reserved


def test_segments_are_reserved_and_returned_when_the_real_allocator_did() -> None:
    assert play(CachingAllocator(), EVENTS) == TRACE["reserved"]


def test_another_order_gives_another_result() -> None:
    """Without returning unused segments after loading, the reserved bytes differ."""
    assert play(CachingAllocator(), [e for e in EVENTS if e]) != TRACE["reserved"]


@pytest.mark.parametrize(
    ("requested", "block_bytes", "reserved"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB - 1, 12 * MIB, 12 * MIB),  # Less than 1 MiB would remain: not split.
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    ],
)
def test_rounding(requested: int, block_bytes: int, reserved: int) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate("x", requested) == block_bytes
    assert allocator.reserved_bytes == reserved


def test_an_empty_storage_needs_no_block() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate("x", 0) == 0
    allocator.free("x")
    assert allocator.reserved_bytes == 0


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(0, 10**6)), max_size=60))
def test_freed_blocks_are_joined_again(requests: list[tuple[int, int]]) -> None:
    """Blocks never exceed the reserved bytes; when all are free, all segments can be returned."""
    allocator = CachingAllocator()
    block_bytes = {key: allocator.allocate(key, size) for key, (size, _) in enumerate(requests)}
    assert all(block_bytes[key] >= size for key, (size, _) in enumerate(requests))
    assert all(size % GRANULARITY == 0 for size in block_bytes.values())
    assert sum(block_bytes.values()) <= allocator.reserved_bytes
    for key in sorted(block_bytes, key=lambda key: requests[key][1]):
        allocator.free(key)
    allocator.release_cache()
    assert allocator.reserved_bytes == 0


def test_unused_segments_are_returned_before_the_limit_fails() -> None:
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.allocate("a", 60 * MIB)
    allocator.free("a")
    allocator.allocate("b", 80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate("c", 30 * MIB)


def test_fragmented_free_memory_does_not_fit() -> None:
    """A plain sum of sizes is too optimistic: 40 MiB are free, but not in one block."""
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.allocate("whole", 100 * MIB)
    allocator.free("whole")
    for key in range(5):
        allocator.allocate(key, 20 * MIB)
    for key in (1, 3):
        allocator.free(key)
    with pytest.raises(OutOfMemory):
        allocator.allocate("large", 40 * MIB)
