"""Searches the largest number with which a job fits, with few plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

_EXTRAPOLATED_PLANS = 6
"""Number of plans after which a search stops extrapolating and uses bisection."""


def largest_that_fits(
    planned: Callable[[int], tuple[int, bool]],
    upper: int,
    guess: int,
    limit: int,
    known: Mapping[int, int] | None = None,
) -> int:
    """Return the largest number from 1 to `upper` with which a job fits, 0 if it fits with none.

    planned: returns (planned bytes, whether the job fits) of a number. guess: the first number to
    plan. limit: bytes that fit. known: number -> planned bytes of numbers above `upper`. Memory
    grows almost linearly with the number, so the search extrapolates from the last two plans for a
    few plans, and then bisects the remaining range.
    """
    low, high = 0, upper + 1
    planned_bytes = dict(known or {})
    guess = min(max(1, guess), upper)
    while high - low > 1:
        planned_bytes[guess], fits = planned(guess)
        if fits:
            low = guess
        else:
            high = guess
        guess = _next_guess(planned_bytes, low, high, limit)
    return low


def _next_guess(planned_bytes: Mapping[int, int], low: int, high: int, limit: int) -> int:
    """Return the next number to plan, between `low` and `high` and excluding both.

    planned_bytes: number -> planned bytes, in the order of planning. limit: bytes that fit.
    """
    middle = (low + high) // 2
    if len(planned_bytes) == 1:  # A small change, because plans of many more tokens take longer.
        return min(2 * low, high - 1) if low else middle
    if len(planned_bytes) > _EXTRAPOLATED_PLANS:
        return middle
    (x1, y1), (x2, y2) = list(planned_bytes.items())[-2:]
    if y1 == y2:
        return middle
    crossing = x2 + math.floor((limit - y2) * (x2 - x1) / (y2 - y1))
    return min(max(crossing, low + 1), high - 1)
