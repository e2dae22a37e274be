"""The model of the caching allocator against the real one's record, and its laws."""

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
    """[index of the event, bytes reserved from then on], as the record has it."""
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


def test_segments_are_taken_and_given_back_when_the_real_allocator_did() -> None:
    assert play(CachingAllocator(), EVENTS) == TRACE["reserved"]


def test_another_order_would_be_seen() -> None:
    """The record decides: without giving segments back after loading, others are taken."""
    assert play(CachingAllocator(), [e for e in EVENTS if e]) != TRACE["reserved"]


@pytest.mark.parametrize(
    ("asked", "given_bytes", "reserved"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB - 1, 12 * MIB, 12 * MIB),  # Less than 1 MiB would be left: it is kept whole.
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    ],
)
def test_rounding(asked: int, given_bytes: int, reserved: int) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate("x", asked) == given_bytes
    assert allocator.reserved_bytes == reserved


def test_nothing_costs_nothing() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate("x", 0) == 0
    allocator.free("x")
    assert allocator.reserved_bytes == 0


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(0, 10**6)), max_size=60))
def test_what_is_freed_becomes_whole_again(requests: list[tuple[int, int]]) -> None:
    """Blocks never overlap a segment's bytes, and when all are free all segments can go."""
    allocator = CachingAllocator()
    weight_format = {key: allocator.allocate(key, size) for key, (size, _) in enumerate(requests)}
    assert all(weight_format[key] >= size for key, (size, _) in enumerate(requests))
    assert all(size % GRANULARITY == 0 for size in weight_format.values())
    assert sum(weight_format.values()) <= allocator.reserved_bytes
    for key in sorted(weight_format, key=lambda key: requests[key][1]):
        allocator.free(key)
    allocator.release_cache()
    assert allocator.reserved_bytes == 0


def test_a_limit_gives_unused_segments_back_before_it_fails() -> None:
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.allocate("a", 60 * MIB)
    allocator.free("a")
    allocator.allocate("b", 80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate("c", 30 * MIB)


def test_what_is_free_in_pieces_does_not_fit() -> None:
    """Why a plain sum promises too much: 40 MiB are free, but not in one piece."""
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.allocate("whole", 100 * MIB)
    allocator.free("whole")
    for key in range(5):
        allocator.allocate(key, 20 * MIB)
    for key in (1, 3):
        allocator.free(key)
    with pytest.raises(OutOfMemory):
        allocator.allocate("large", 40 * MIB)
