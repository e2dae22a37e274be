"""The ledger as data: nothing gets lost where two of them meet, or on the way through a file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_cli.memory.ledger import Allocator, InstrumentCost, Ledger, Phase, larger_of_each
from tests.helpers import results


def phase(name: str, peak_bytes: int) -> Phase:
    return Phase(name, peak_bytes, 1, {"base": peak_bytes})


def test_a_file_gives_back_the_ledger() -> None:
    whole = replace(
        results.LEDGER,
        before_planned_bytes=5,
        floor_bytes=6,
        instrument_cost=InstrumentCost(9, 4, 2.0, 1.0, 77),
        notes=("a", "b"),
    )
    for ledger in (results.LEDGER, whole):
        assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_a_file_without_the_newer_fields_is_read() -> None:
    content = results.LEDGER.to_dict()
    for newer in ("before_planned_bytes", "floor_bytes", "instrument_cost", "notes"):
        del content[newer]
    assert Ledger.from_dict(content) == results.LEDGER


def test_a_phase_of_two_processes_is_its_worse_time() -> None:
    earlier = (phase("load", 5), phase("first_step", 9), phase("step", 7))
    now = (phase("load", 6), phase("step", 3), phase("eval", 2))
    both = larger_of_each(earlier, now)
    assert [(one.name, one.peak_bytes) for one in both] == [
        ("load", 6),
        ("first_step", 9),
        ("step", 7),
        ("eval", 2),
    ]
    assert larger_of_each((), now) == now
    assert larger_of_each(earlier, ()) == earlier


def test_what_a_counter_saw_beyond_the_categories_is_other() -> None:
    assert phase("step", 7).at_least(7) == phase("step", 7)
    assert phase("step", 7).at_least(3) == phase("step", 7)
    more = phase("step", 7).at_least(10).at_least(12)
    assert (more.peak_bytes, more.at_peak) == (12, {"base": 7, "other": 5})


def test_a_phase_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(AssertionError, match="add up to 3"):
        Phase("step", 4, 0, {"base": 3})


def test_counters_of_two_processes_are_the_higher_of_each() -> None:
    assert Allocator(1, 5, 9).larger_of_each(Allocator(2, 4, 9)) == Allocator(2, 5, 9)
