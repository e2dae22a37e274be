"""The ledger: two of them can be merged, and a file contains all of its data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_cli.memory.ledger import Allocator, InstrumentCost, Ledger, Phase, larger_of_each
from tests.helpers import results


def phase(name: str, peak_bytes: int) -> Phase:
    return Phase(name, peak_bytes, 1, {"base": peak_bytes})


def test_a_ledger_can_be_read_from_its_file() -> None:
    complete = replace(
        results.LEDGER,
        before_planned_bytes=5,
        floor_bytes=6,
        instrument_cost=InstrumentCost(9, 4, 2.0, 1.0, 77),
        notes=("a", "b"),
    )
    for ledger in (results.LEDGER, complete):
        assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_a_file_without_the_newer_fields_is_read() -> None:
    content = results.LEDGER.to_dict()
    for key in ("before_planned_bytes", "floor_bytes", "instrument_cost", "notes"):
        del content[key]
    assert Ledger.from_dict(content) == results.LEDGER


def test_a_phase_of_two_processes_has_the_higher_peak() -> None:
    earlier = (phase("load", 5), phase("first_step", 9), phase("step", 7))
    later = (phase("load", 6), phase("step", 3), phase("eval", 2))
    both = larger_of_each(earlier, later)
    assert [(item.name, item.peak_bytes) for item in both] == [
        ("load", 6),
        ("first_step", 9),
        ("step", 7),
        ("eval", 2),
    ]
    assert larger_of_each((), later) == later
    assert larger_of_each(earlier, ()) == earlier


def test_untracked_bytes_of_the_device_counter_are_other() -> None:
    assert phase("step", 7).at_least(7) == phase("step", 7)
    assert phase("step", 7).at_least(3) == phase("step", 7)
    more = phase("step", 7).at_least(10).at_least(12)
    assert (more.peak_bytes, more.at_peak) == (12, {"base": 7, "other": 5})


def test_a_phase_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(AssertionError, match="add up to 3"):
        Phase("step", 4, 0, {"base": 3})


def test_allocator_peaks_of_two_processes_are_the_higher_of_each() -> None:
    assert Allocator(1, 5, 9).larger_of_each(Allocator(2, 4, 9)) == Allocator(2, 5, 9)
