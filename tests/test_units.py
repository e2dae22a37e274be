"""Numbers as text."""

from __future__ import annotations

import pytest

from qlora_cli.units import format_figure


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0000195, "0.0000195"),
        (0.239, "0.239"),
        (1.0, "1.00"),
        (66.44, "66.4"),
        (376.2, "376"),
        (1049.6, "1,050"),
        (2.57e6, "2,570,000"),
    ],
)
def test_a_figure_has_no_exponent(value: float, text: str) -> None:
    assert format_figure(value) == text
