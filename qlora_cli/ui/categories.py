"""How each category of the ledger is shown: its label in tables, its color and hatch in figures.

This is the one mapping from `memory.ledger.CATEGORIES` to labels and colors. It has exactly one
entry for each category, in the same order; a test compares the two. Neighbours in a stacked bar
differ in lightness and mostly also in hatch, so that the figures are legible in greyscale.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CategoryStyle:
    """How one category is shown. color: as matplotlib reads it. hatch: matplotlib's pattern."""

    label: str
    color: str
    hatch: str = ""


CATEGORY_STYLES = {
    "base": CategoryStyle("base", "#1b2a41"),
    "quant_constants": CategoryStyle("quantization constants", "#8fb8de"),
    "embeddings": CategoryStyle("embeddings", "#3d5a80", "//"),
    "head": CategoryStyle("head", "#cfe0f1"),
    # Full fine-tuning counts all its trained weights in this category.
    "adapter": CategoryStyle("adapter (trained)", "#c76a2e"),
    "gradients": CategoryStyle("gradients", "#f2b880", "||"),
    "optimizer": CategoryStyle("optimizer", "#7d3c10", "\\\\"),
    "activations": CategoryStyle("activations", "#f7dfc4"),
    "loss": CategoryStyle("loss", "#4d7c5b", "//"),
    "temporary": CategoryStyle("temporary", "#a9cfb0"),
    "other": CategoryStyle("other", "#6b6b6b", "--"),
}
"""Category of the ledger -> how it is shown."""


def category_label(category: str) -> str:
    """Return the text that tables and figures show for a category of the ledger."""
    return CATEGORY_STYLES[category].label
