"""Memory over time: what was alive, by category, while a phase was tracked.

A step makes thousands of storages; a figure shows hundreds of moments. So each tracked stretch is
thinned while it is recorded: an interval of changes becomes its highest moment, and intervals are
joined in pairs as soon as there are too many. A stretch's peak is therefore always among its
moments. Time is the host's: on a card the moment at which work is asked for, not done.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.memory.ledger import CATEGORIES

MOST_MOMENTS = 600
"""Of one stretch; more than a figure of 1000 pixels can show apart."""


@dataclass(frozen=True)
class PhaseTrace:
    """One tracked phase. step: the optimizer step, counted from 1, where it is one.

    seconds: of each moment, since the job began, rising. bytes: category -> what lived at each of
    these moments. marks: (seconds, what began then).
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
        assert not uneven, f"{self.phase}: not one figure a moment: {uneven}"

    @property
    def totals(self) -> list[int]:
        """Bytes of all categories at each moment."""
        rows = self.bytes.values()
        return [sum(moment) for moment in zip(*rows, strict=True)] or [0] * len(self.seconds)

    @property
    def peak_bytes(self) -> int:
        """The stretch's highest moment; 0 where nothing lived."""
        return max(self.totals, default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {
            "phase": self.phase,
            "step": self.step,
            "seconds": [round(moment, 6) for moment in self.seconds],
            "bytes": {name: list(row) for name, row in self.bytes.items()},
            "marks": [[round(moment, 6), name] for moment, name in self.marks],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PhaseTrace:
        """The inverse of `to_dict`; raises KeyError, TypeError, ValueError or AssertionError."""
        marks = tuple((float(moment), str(name)) for moment, name in content["marks"])
        rows = {name: array("q", row) for name, row in content["bytes"].items()}
        seconds = array("d", content["seconds"])
        return cls(content["phase"], content["step"], seconds, rows, marks)


class Timeline:
    """Records one stretch after the other; what happens outside of them is not seen.

    clock: seconds, never going back; the job begins when the timeline is made.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._stretches: list[PhaseTrace] = []
        self._open: _Recording | None = None
        self._latest: dict[str, int] = {}

    @property
    def stretches(self) -> tuple[PhaseTrace, ...]:
        """Those that have ended, in order."""
        return tuple(self._stretches)

    def begin(self, phase: str) -> None:
        """A tracked phase begins."""
        assert self._open is None, f"{phase} begins inside another stretch"
        self._open = _Recording(phase)
        self._open.add(self._now(), self._latest)

    def set_step(self, step: int) -> None:
        """The stretch under way is this optimizer step, counted from 1."""
        if self._open is not None:
            self._open.step = step

    def end(self) -> None:
        """The stretch under way is over, by an error too; nothing where there is none."""
        if self._open is not None:
            self._stretches.append(self._open.finish(self._now()))
            self._open = None

    def update(self, by_category: Mapping[str, int]) -> None:
        """What lives from now on; copied. Between stretches it is where the next one begins.

        What lives only inside one operation is told by two calls, with it and without it.
        """
        self._latest = dict(by_category)
        if self._open is not None:
            self._open.add(self._now(), self._latest)

    def mark(self, name: str) -> None:
        """Something begins now: forward, backward, update."""
        if self._open is not None:
            self._open.marks.append((self._now(), name))

    def to_dict(self) -> dict[str, Any]:
        """What `timeline.json` holds."""
        return {"stretches": [stretch.to_dict() for stretch in self._stretches]}

    def _now(self) -> float:
        return self._clock() - self._began


def read_stretches(content: dict[str, Any]) -> tuple[PhaseTrace, ...]:
    """The inverse of `Timeline.to_dict`; raises as `PhaseTrace.from_dict` on a damaged one."""
    return tuple(PhaseTrace.from_dict(stretch) for stretch in content["stretches"])


@dataclass(frozen=True, slots=True)
class _Moment:
    seconds: float
    total: int
    bytes: dict[str, int]


class _Recording:
    """A stretch under way. Each moment stands for `_joined` changes, the last one for fewer."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.step: int | None = None
        self.marks: list[tuple[float, str]] = []
        self._moments: list[_Moment] = []
        self._joined = 1
        self._in_last = 0
        self._latest: dict[str, int] = {}

    def add(self, seconds: float, by_category: dict[str, int]) -> None:
        self._latest = by_category
        moment = _Moment(seconds, sum(by_category.values()), by_category)
        if self._in_last in (0, self._joined):
            self._halve_when_full()
            self._moments.append(moment)
            self._in_last = 0
        elif moment.total > self._moments[-1].total:
            self._moments[-1] = moment
        self._in_last += 1

    def finish(self, seconds: float) -> PhaseTrace:
        """With what lived at the end as the last moment."""
        self._moments.append(_Moment(seconds, sum(self._latest.values()), self._latest))
        seen = {name for moment in self._moments for name, size in moment.bytes.items() if size}
        return PhaseTrace(
            phase=self.phase,
            step=self.step,
            seconds=array("d", (moment.seconds for moment in self._moments)),
            bytes={
                name: array("q", (moment.bytes.get(name, 0) for moment in self._moments))
                for name in CATEGORIES
                if name in seen
            },
            marks=tuple(self.marks),
        )

    def _halve_when_full(self) -> None:
        """Leaves room for the last moment, which `finish` adds."""
        if len(self._moments) < MOST_MOMENTS - 1:
            return
        pairs = (self._moments[at : at + 2] for at in range(0, len(self._moments), 2))
        self._moments = [max(pair, key=lambda moment: moment.total) for pair in pairs]
        self._joined *= 2
