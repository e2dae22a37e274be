"""Limit how many faults one message lists."""

from __future__ import annotations

from collections.abc import Sequence

MAX_FAULTS = 10
"""Number of faults that are listed one by one; the others are only counted."""


def shorten_faults(faults: Sequence[str]) -> tuple[str, ...]:
    """Return the first `MAX_FAULTS` faults and, if there are more, the number of the others."""
    num_others = len(faults) - MAX_FAULTS
    others = [f"and {num_others} more"] if num_others > 0 else []
    return (*faults[:MAX_FAULTS], *others)
