"""Decide whether a quantization explains how much a server's answers differ."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_cli.export.serve.fit import CLOSE
from qlora_cli.export.serve.rounding import Bits, Change

_TIMES_DIFFERENCE = 2
_TIMES_GAP = 3
"""How many times the change by rounding is allowed. docs/merging.md has the measured values.

Gaps vary more, because a few tokens decide them and a server may not report its tokens.
"""
_LARGEST_GAP = 1.0
"""Mean gap in nats per token that is never allowed. A rounding with this effect ruins the model."""


def weight_fault(change: Change, rounding: Mapping[Bits, Change], bits: Bits) -> str | None:
    """Return the fault if the answers differ too much; None if they do not.

    change: of the server. rounding: change by rounding the merged model. bits: per weight, of the
    strongest quantization that is allowed; if it is not 4, log-probabilities must be known.
    """
    found = _text(change)
    if not change.mean_gap <= _LARGEST_GAP or not _is_within(change, rounding[4]):
        return (
            f"weights: the answers differ by {found}, and rounding the merged model to 4 bits "
            f"changes it by {_text(rounding[4])}: the server has another file, or a quantization "
            "that damages the model"
        )
    if not _is_within(change, rounding[bits]):
        return (
            f"quantization: the answers differ by {found}, and rounding the merged model to {bits} "
            f"bits changes it by {_text(rounding[bits])}: the server's quantization is stronger"
        )
    # Weaker roundings come first.
    nearest = next(level for level in rounding.values() if _is_within(change, level))
    if change.mean_gap > max(CLOSE, _TIMES_GAP * nearest.mean_gap):
        return (
            "sampling: the server's log-probabilities are the merged model's, but its tokens are "
            f"{change.mean_gap:.2g} nats less likely than the top-1 token: it applies a penalty, "
            "or does not decode greedily"
        )
    return None


def quantization_text(change: Change, rounding: Mapping[Bits, Change]) -> str:
    """Return a sentence on how much the answers differ and how much roundings change the model."""
    text = f"The answers differ by {_text(change)}."
    if not rounding:
        return text
    levels = ", ".join(f"to {bits} bits {_text(level)}" for bits, level in rounding.items())
    return f"{text} Rounding the merged model changes it: {levels}."


def _is_within(change: Change, level: Change) -> bool:
    """Return whether a change is that of a rounding. NaN is not.

    The log-probabilities decide if they are known, because they differ at every token.
    """
    if change.mean_difference is None or level.mean_difference is None:
        return change.mean_gap <= max(CLOSE, _TIMES_GAP * level.mean_gap)
    allowed = max(CLOSE, _TIMES_DIFFERENCE * level.mean_difference)
    return change.mean_difference <= allowed


def _text(change: Change) -> str:
    text = f"{change.mean_gap:.2g} nats per token"
    if change.mean_difference is not None:
        text += f" (log-probabilities: {change.mean_difference:.2g})"
    return text
