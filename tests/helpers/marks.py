"""Marks of tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def slow_after_first(cases: Sequence[Any]) -> list[Any]:
    """Return the cases of a parametrized test; all after the first are marked `slow`.

    So the fast subset tests the law once and the complete suite tests every case.
    """
    return [cases[0], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[1:])]
