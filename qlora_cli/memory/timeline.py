"""Memory over time: the living bytes by category while a phase was tracked.

A step creates thousands of storages, and a figure shows hundreds of moments. So each trace is
thinned while it is recorded: every interval of changes becomes one moment, the one with the most
bytes, and neighbouring moments are merged in pairs as soon as there are too many. The peak of a
trace is therefore always among its moments. Times are taken on the CPU: for a GPU they are the
times at which work was submitted.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.memory.ledger import CATEGORIES, PHASE_ORDER

_LARGEST = 1e15
"""Seconds or bytes that no run has."""
MAX_MOMENTS = 600
"""Moments of one trace. A figure that is 1000 pixels wide cannot show more."""


@dataclass(frozen=True)
class PhaseTrace:
    """The memory of one tracked phase over time.

    phase: name of the phase. step: optimizer step, counted from 1; None if the phase is not a step.
    seconds: time of each moment since the job began, rising. bytes: category -> living bytes at
    each moment. marks: (seconds, name of the part of the step that began then).
    """

    phase: str
    step: int | None
    seconds: Sequence[float]
    bytes: Mapping[str, Sequence[int]]
    marks: tuple[tuple[float, str], ...]

    def __post_init__(self) -> None:
        unknown = set(self.bytes) - set(CATEGORIES)
        assert not unknown, f"{self.phase}: unknown categories {sorted(unknown)}"
        uneven = [name for name, row in self.bytes.items() if len(row) != len(self.seconds)]
        assert not uneven, (
            f"{self.phase}: number of values differs from number of moments: {uneven}"
        )

    @property
    def totals(self) -> list[int]:
        """Bytes of all categories together at each moment."""
        rows = self.bytes.values()
        return [sum(moment) for moment in zip(*rows, strict=True)] or [0] * len(self.seconds)

    @property
    def peak_bytes(self) -> int:
        """Highest total of the trace; 0 if nothing lived."""
        return max(self.totals, default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as plain lists for JSON."""
        return {
            "phase": self.phase,
            "step": self.step,
            "seconds": [round(moment, 6) for moment in self.seconds],
            "bytes": {name: list(row) for name, row in self.bytes.items()},
            "marks": [[round(moment, 6), name] for moment, name in self.marks],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PhaseTrace:
        """Return the trace of an object that `to_dict` created.

        Raises KeyError, TypeError, ValueError or AssertionError if the object is damaged.
        """
        marks = tuple((float(moment), str(name)) for moment, name in content["marks"])
        rows = {name: array("q", row) for name, row in content["bytes"].items()}
        seconds = array("d", content["seconds"])
        phase, step = content["phase"], content["step"]
        assert phase in PHASE_ORDER, "unknown phase"
        assert step is None or (type(step) is int and 0 <= step < 2**53), "the step is no number"
        moments = [*seconds, *(moment for moment, _ in marks)]
        assert all(0 <= moment < _LARGEST for moment in moments), "impossible times"
        assert all(0 <= size < _LARGEST for row in rows.values() for size in row), (
            "impossible sizes"
        )
        return cls(phase, step, seconds, rows, marks)


class Timeline:
    """Records one trace after another. Changes outside a trace only set where the next one starts.

    clock: returns seconds and never decreases. The job begins when the timeline is created.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._traces: list[PhaseTrace] = []
        self._open: _OpenTrace | None = None
        self._latest: dict[str, int] = {}

    @property
    def traces(self) -> tuple[PhaseTrace, ...]:
        """The finished traces, in order."""
        return tuple(self._traces)

    def begin(self, phase: str) -> None:
        """Start the trace of a phase."""
        assert self._open is None, f"{phase} begins inside another trace"
        self._open = _OpenTrace(phase)
        self._open.add(self._now(), self._latest)

    def set_step(self, step: int) -> None:
        """Set the optimizer step of the open trace, counted from 1."""
        if self._open is not None:
            self._open.step = step

    def end(self) -> None:
        """Finish the open trace; do nothing if there is none. Also called after an error."""
        if self._open is not None:
            self._traces.append(self._open.finish(self._now()))
            self._open = None

    def update(self, by_category: Mapping[str, int]) -> None:
        """Set the living bytes from now on. The mapping is copied.

        Memory that lives only inside one operation needs two calls, one with it and one without it.
        """
        self._latest = dict(by_category)
        if self._open is not None:
            self._open.add(self._now(), self._latest)

    def mark(self, name: str) -> None:
        """Record that a part of a step begins now: forward, backward, update."""
        if self._open is not None:
            self._open.marks.append((self._now(), name))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `timeline.json`."""
        return timeline_content(self._traces)

    def _now(self) -> float:
        return self._clock() - self._began


def timeline_content(traces: Sequence[PhaseTrace]) -> dict[str, Any]:
    """Return the content of `timeline.json` for these traces."""
    return {"stretches": [trace.to_dict() for trace in traces]}


def read_traces(content: dict[str, Any]) -> tuple[PhaseTrace, ...]:
    """Return the traces of the content of `timeline.json`.

    Raises the errors of `PhaseTrace.from_dict` if the content is damaged.
    """
    return tuple(PhaseTrace.from_dict(trace) for trace in content["stretches"])


@dataclass(frozen=True, slots=True)
class _Moment:
    seconds: float
    total: int
    bytes: dict[str, int]


class _OpenTrace:
    """The trace that is being recorded.

    Each moment represents `_changes_per_moment` changes; the last one may represent fewer.
    """

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.step: int | None = None
        self.marks: list[tuple[float, str]] = []
        self._moments: list[_Moment] = []
        self._changes_per_moment = 1
        self._changes_in_last = 0
        self._latest: dict[str, int] = {}

    def add(self, seconds: float, by_category: dict[str, int]) -> None:
        self._latest = by_category
        moment = _Moment(seconds, sum(by_category.values()), by_category)
        if self._changes_in_last in (0, self._changes_per_moment):
            self._merge_if_full()
            self._moments.append(moment)
            self._changes_in_last = 0
        elif moment.total > self._moments[-1].total:
            self._moments[-1] = moment
        self._changes_in_last += 1

    def finish(self, seconds: float) -> PhaseTrace:
        """Return the trace, with the living bytes at its end as the last moment."""
        self._moments.append(_Moment(seconds, sum(self._latest.values()), self._latest))
        present = {name for moment in self._moments for name, size in moment.bytes.items() if size}
        return PhaseTrace(
            phase=self.phase,
            step=self.step,
            seconds=array("d", (moment.seconds for moment in self._moments)),
            bytes={
                name: array("q", (moment.bytes.get(name, 0) for moment in self._moments))
                for name in CATEGORIES
                if name in present
            },
            marks=tuple(self.marks),
        )

    def _merge_if_full(self) -> None:
        """Merge moments in pairs if only one place is left, the one of the final moment."""
        if len(self._moments) < MAX_MOMENTS - 1:
            return
        pairs = (self._moments[start : start + 2] for start in range(0, len(self._moments), 2))
        self._moments = [max(pair, key=lambda moment: moment.total) for pair in pairs]
        self._changes_per_moment *= 2
