"""The label of a token that is not trained. No torch: the processes that tokenize import this."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a token that does not contribute to the loss."""
