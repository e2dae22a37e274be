"""A shade and a hatching for each category of the ledger, in its order.

Neighbours differ in lightness, and most in hatching too, so that figures are legible in greyscale.
"""

from __future__ import annotations

SHADES = (
    "#1b2a41",
    "#8fb8de",
    "#3d5a80",
    "#cfe0f1",
    "#c76a2e",
    "#f2b880",
    "#7d3c10",
    "#f7dfc4",
    "#4d7c5b",
    "#a9cfb0",
    "#6b6b6b",
)
HATCHES = ("", "", "//", "", "", "||", "\\\\", "", "//", "", "--")
