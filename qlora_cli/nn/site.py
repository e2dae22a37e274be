"""Where one linear of a model is, and in which orientation a checkpoint file stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One linear of the model that a family knows.

    path: in the model, `model.layers.0.self_attn.q_proj`. rows: each role's rows of the output,
    (out, in) orientation. transposed: the file holds (in, out).
    """

    path: str
    roles: tuple[str, ...]
    rows: Mapping[str, slice]
    in_features: int
    out_features: int
    bias: bool
    transposed: bool
