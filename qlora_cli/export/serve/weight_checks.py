"""Decide whether a quantization explains how much a server's answers differ."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_cli.export.serve.rounding import Change
from qlora_cli.recipe.schema import Bits

_TIMES = 3
"""How many times the change by rounding is allowed. docs/merging.md has the measured values."""
_ALLOWED = Change(mean_gap=0.02, mean_difference=0.02)
"""Change in nats per token that is always allowed."""


def weight_fault(change: Change, rounding: Mapping[Bits, Change], bits: Bits) -> str | None:
    """Return the fault if the weights differ too much; None if they do not.

    change: of the server. rounding: change by rounding the merged model. bits: per weight, of the
    strongest quantization that is allowed.
    """
    if _is_within(change, rounding[bits]):
        return None
    found = _text(change)
    if not _is_within(change, rounding[4]):
        return (
            f"weights: the answers differ by {found}, and rounding the merged model to 4 bits "
            f"changes it by {_text(rounding[4])}: the server has another file, or a quantization "
            "that damages the model"
        )
    return (
        f"quantization: the answers differ by {found}, and rounding the merged model to {bits} "
        f"bits changes it by {_text(rounding[bits])}: the server's quantization is stronger"
    )


def quantization_text(change: Change, rounding: Mapping[Bits, Change]) -> str:
    """Return a sentence on how much the answers differ and how much roundings change the model."""
    levels = ", ".join(f"to {bits} bits {_text(level)}" for bits, level in rounding.items())
    return f"The answers differ by {_text(change)}. Rounding the merged model changes it: {levels}."


def _is_within(change: Change, level: Change) -> bool:
    allowed = max(_ALLOWED.mean_gap, _TIMES * level.mean_gap)
    # `not <=` also reports NaN.
    if not change.mean_gap <= allowed:
        return False
    if change.mean_difference is None or level.mean_difference is None:
        return True
    assert _ALLOWED.mean_difference is not None
    return change.mean_difference <= max(_ALLOWED.mean_difference, _TIMES * level.mean_difference)


def _text(change: Change) -> str:
    text = f"{change.mean_gap:.2g} nats per token"
    if change.mean_difference is not None:
        text += f" (log-probabilities: {change.mean_difference:.2g})"
    return text
