"""What the planner concludes from a dry run, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """One change that would make the job smaller. change: `train.micro_batch=1`."""

    change: str
    saves_bytes: int
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Line:
    """One line of arithmetic. unit: B, x or nothing. assumption: what is counted, in words."""

    name: str
    value: float
    unit: str
    assumption: str
