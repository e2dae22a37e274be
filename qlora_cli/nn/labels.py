"""The label of a token that is not trained. No torch, so that other processes need not import it."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a token that does not contribute to the loss."""
