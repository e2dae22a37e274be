"""The instrument's own records are counted; the objects that they refer to are not."""

from __future__ import annotations

import sys
import weakref

import torch

from qlora_cli.memory.instrument_cost import record_bytes
from qlora_cli.memory.timeline import Timeline


def test_each_record_is_counted_once() -> None:
    number, text = 10**12, "text" * 9
    rows = [number, text, {text: number}]
    parts = sum(map(sys.getsizeof, (rows, rows[2], number, text)))
    assert record_bytes(rows) == parts
    assert record_bytes(rows, rows[2], rows) == parts


def test_referenced_tensors_and_modules_are_not_counted() -> None:
    tensor = torch.zeros(1000)
    without = record_bytes([None])
    assert record_bytes([tensor]) == without
    assert record_bytes([torch]) == without
    assert record_bytes([weakref.ref(tensor)]) < without + 200


def test_a_closure_is_counted_with_its_variables_and_without_globals() -> None:
    record = list(range(1000, 2000))

    def callback() -> object:
        return record, sys

    closure_bytes = record_bytes(callback)
    assert record_bytes(record) < closure_bytes < record_bytes(record) + 1000


def test_a_timeline_grows_with_its_moments() -> None:
    timeline = Timeline()
    before = record_bytes(timeline)
    timeline.begin("step")
    for size in range(500):
        timeline.update({"base": size})
    timeline.end()
    grown = record_bytes(timeline) - before
    assert 500 * (8 + 8) <= grown < 500 * (8 + 8) + 5000
