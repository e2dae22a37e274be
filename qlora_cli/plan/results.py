"""Results that the planner derives from dry runs, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """A change of the recipe and its planned effect.

    change: one or more overrides, such as `train.micro_batch=1`. saves_bytes: reduction of the
    peak. peak_bytes: planned peak after the change. fits: whether the job then fits the device.
    """

    change: str
    saves_bytes: int
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Line:
    """One line of the LoRA paper's arithmetic.

    unit: "B" (bytes), "x" (a ratio) or "". assumption: what the value counts, in words.
    """

    name: str
    value: float
    unit: str
    assumption: str
