"""A server's differences are compared with those that rounding the model causes."""

from __future__ import annotations

import math

import pytest

from qlora_cli.export.serve.rounding import Bits, Change
from qlora_cli.export.serve.weight_checks import weight_fault

ROUNDING: dict[Bits, Change] = {8: Change(0.001, 0.03), 4: Change(0.1, 0.3)}


@pytest.mark.parametrize(
    ("change", "bits", "fault"),
    [
        (Change(0.001, 0.05), 8, None),
        (Change(0.05, 0.2), 4, None),
        (Change(0.05, 0.2), 8, "quantization: "),
        (Change(0.2, 0.7), 4, "weights: "),
        (Change(0.2, 0.001), 4, "sampling: "),
        (Change(1.1, 0.001), 4, "weights: "),
        (Change(0.2, None), 4, None),
        (Change(0.4, None), 4, "weights: "),
        (Change(math.nan, math.nan), 4, "weights: "),
    ],
)
def test_the_cause_of_a_difference(change: Change, bits: Bits, fault: str | None) -> None:
    found = weight_fault(change, ROUNDING, bits)
    assert found is None if fault is None else str(found).startswith(fault)
