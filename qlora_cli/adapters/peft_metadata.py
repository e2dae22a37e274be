"""What this package adds to the header of an adapter's safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.files.atomic import PARSE_ERRORS
from qlora_cli.recipe.adapter import INITS

_HEADER_KEY = "qlora"


@dataclass(frozen=True)
class AdapterMetadata:
    """What `save_adapter` adds to the safetensors header. The field names are the JSON keys.

    rank, alpha, rslora: the settings of one role's A and B, before they are stacked.
    blocks: path of a fused layer -> role -> (first, end) of its rows of B, in the order of the
        columns of B.
    ranks, alphas: path of a linear -> rank and alpha of one role, if they are others. Files of
        older versions have none.
    init: `adapter.init` of the training, if the file has the factors that it began with, too
        (`peft_initial.py`); else empty. Ranks and alphas are those of the training.
    """

    rank: int
    alpha: float
    rslora: bool
    blocks: Mapping[str, Mapping[str, tuple[int, int]]]
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    init: str = ""

    def header(self) -> dict[str, str]:
        """Return the entry for the safetensors header, whose values must be text."""
        content = {key: value for key, value in vars(self).items() if value not in ({}, "")}
        return {_HEADER_KEY: json.dumps({"blocks": {}} | content)}

    @classmethod
    def of(cls, header: Mapping[str, str], file: Path) -> AdapterMetadata | None:
        """Parse a safetensors header. Return None if another program wrote the file.

        Raises ModelError if the entry is damaged.
        """
        if _HEADER_KEY not in header:
            return None
        try:
            content = json.loads(header[_HEADER_KEY])
            blocks = {
                path: {role: (int(first), int(end)) for role, (first, end) in spans.items()}
                for path, spans in content["blocks"].items()
            }
            rank, alpha = int(content["rank"]), float(content["alpha"])
            ranks = {path: int(own) for path, own in content.get("ranks", {}).items()}
            alphas = {path: float(own) for path, own in content.get("alphas", {}).items()}
            assert all(1 <= own < 2**31 for own in (rank, *ranks.values())), "impossible rank"
            assert all(map(math.isfinite, [alpha, *alphas.values()])), "an alpha is not finite"
            init = str(content.get("init", ""))
            assert init in ("", *INITS), "unknown init"
            return cls(rank, alpha, bool(content["rslora"]), blocks, ranks, alphas, init)
        except PARSE_ERRORS as fault:
            raise ModelError(f"damaged header: {str(fault)[:200]}", where=str(file)) from fault
