"""Memory over time: thinning keeps every peak, and a file contains all recorded data."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.memory.timeline import MAX_MOMENTS, Timeline, read_traces


def ticking() -> Timeline:
    """Return a timeline whose clock advances by one second per reading."""
    clock = itertools.count()
    return Timeline(lambda: float(next(clock)))


@given(st.integers(0, 5000), st.integers(0, 2**40), st.data())
@settings(max_examples=40, deadline=None)
def test_the_highest_moment_is_kept_at_any_position(
    num_changes: int, height: int, data: st.DataObject
) -> None:
    peak_at = data.draw(st.integers(0, num_changes))
    timeline = ticking()
    timeline.begin("step")
    for change in range(num_changes + 1):
        high = {"activations": height + 1_000, "base": 7}
        low = {"activations": change * 31 % 1_000, "base": 7}
        timeline.update(high if change == peak_at else low)
    timeline.end()
    (trace,) = timeline.traces
    assert trace.peak_bytes == height + 1_007
    assert len(trace.seconds) <= MAX_MOMENTS
    assert list(trace.seconds) == sorted(trace.seconds)
    at = trace.totals.index(trace.peak_bytes)
    assert trace.seconds[at] == peak_at + 2


def test_few_changes_are_kept_with_their_times_and_the_end() -> None:
    timeline = ticking()
    timeline.begin("load")
    for size in range(1, 6):
        timeline.update({"base": size})
    timeline.end()
    (trace,) = timeline.traces
    assert list(trace.seconds) == [1, 2, 3, 4, 5, 6, 7]
    assert list(trace.bytes["base"]) == [0, 1, 2, 3, 4, 5, 5]


def test_thinned_moments_are_spread_evenly_over_the_trace() -> None:
    timeline = ticking()
    timeline.begin("step")
    for change in range(50_000):
        timeline.update({"base": change})
    timeline.end()
    (trace,) = timeline.traces
    gaps = [b - a for a, b in itertools.pairwise(trace.seconds)]
    assert len(gaps) > MAX_MOMENTS / 4
    assert max(gaps) <= 2 * 50_000 / len(gaps)


def test_the_given_mapping_is_copied() -> None:
    timeline, living = ticking(), {"base": 1}
    timeline.begin("load")
    timeline.update(living)
    living["base"] = 9
    timeline.end()
    assert list(timeline.traces[0].bytes["base"]) == [0, 1, 1]


def test_a_trace_begins_with_the_bytes_before_it() -> None:
    timeline = ticking()
    timeline.begin("load")
    timeline.update({"base": 8})
    timeline.end()
    timeline.update({"base": 6})
    timeline.begin("step")
    timeline.end()
    assert list(timeline.traces[1].bytes["base"]) == [6, 6]


def test_marks_and_the_step_belong_to_the_open_trace() -> None:
    timeline = ticking()
    timeline.mark("forward")
    timeline.set_step(1)
    timeline.begin("step")
    timeline.set_step(3)
    timeline.mark("forward")
    timeline.mark("backward")
    timeline.end()
    timeline.begin("eval")
    timeline.end()
    step, evaluation = timeline.traces
    assert (step.step, step.marks) == (3, ((2.0, "forward"), (3.0, "backward")))
    assert (evaluation.step, evaluation.marks) == (None, ())
    assert evaluation.peak_bytes == 0


def test_outside_a_trace_nothing_is_recorded() -> None:
    timeline = ticking()
    timeline.update({"base": 1})
    timeline.end()
    assert timeline.traces == ()
    timeline.begin("load")
    with pytest.raises(AssertionError, match="inside another"):
        timeline.begin("step")


def test_traces_can_be_read_from_their_file() -> None:
    timeline = ticking()
    for step in range(2):
        timeline.begin("step")
        timeline.set_step(step + 1)
        timeline.mark("forward")
        for size in range(2000):
            timeline.update({"base": 5, "activations": size, "loss": 0})
        timeline.end()
    content = json.loads(json.dumps(timeline.to_dict()))
    assert read_traces(content) == timeline.traces
    assert set(content["stretches"][0]) == {"phase", "step", "seconds", "bytes", "marks"}
    assert set(content["stretches"][0]["bytes"]) == {"base", "activations"}


@pytest.mark.parametrize(
    "damage",
    [{"bytes": {"base": [1]}}, {"bytes": {"bases": [1, 2]}}, {"seconds": ["x", 2]}, {"marks": [1]}],
)
def test_a_damaged_trace_raises_an_error(damage: dict[str, object]) -> None:
    valid = {"phase": "load", "step": None, "seconds": [1, 2], "bytes": {"base": [1, 2]}}
    valid |= {"marks": []}
    assert len(read_traces({"stretches": [valid]})) == 1
    with pytest.raises((AssertionError, TypeError, ValueError)):
        read_traces({"stretches": [valid | damage]})
