"""Keeps the mix of bits that was found for a base, so that no other command measures it again."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_cli.export.compare.eval_rows import EvalRows
from qlora_cli.files import cache
from qlora_cli.files.atomic import PARSE_ERRORS, write_json
from qlora_cli.files.source import config_digest, fingerprint
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.jobs.quantize_results import QuantizeResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.units import format_bytes

_LAYOUT = 2
"""Version of the search, and of what an entry contains."""
_PACKAGES = ("qlora-cli", "torch", "bitsandbytes", "transformers")


def read(prepared: Prepared, budget: int, rows: EvalRows) -> dict[str, Any] | None:
    """Return what `write` stored for a base, a budget in bytes and rows; None if nothing is."""
    with suppress(OSError, *PARSE_ERRORS):
        found: dict[str, Any] = json.loads(_file(prepared, budget, rows).read_text())["mix"]
        return found
    return None


def write(prepared: Prepared, rows: EvalRows, result: QuantizeResult) -> dict[str, Any]:
    """Store the mix of a result with a budget, and return what was stored.

    Without a folder to write to, it is only returned.
    """
    assert result.budget_bytes is not None
    chosen = result.chosen
    mix = {
        "overrides": dict(chosen.overrides),
        "kl": chosen.kl,
        "plain_kl": result.plain.kl,
        "bytes": chosen.bytes,
        "linears": len(result.linears),
        "upgraded": sum(cost.bits > 4 for cost in result.linears),
    }
    file = _file(prepared, result.budget_bytes, rows)
    name = f"{prepared.recipe.model.name} in {format_bytes(result.budget_bytes)}"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"description": name, "mix": mix})
    return mix


def _file(prepared: Prepared, budget: int, rows: EvalRows) -> Path:
    """Return the file of a mix, named by everything that it depends on."""
    tokens = json.dumps([[list(row.ids), list(row.labels)] for row in rows.rows])
    base = prepared.recipe.base
    key = cache.key_of(
        {
            "layout": _LAYOUT,
            "base": fingerprint(prepared.folder),
            "config": config_digest(prepared.folder),
            "rows": hashlib.sha256(tokens.encode()).hexdigest(),
            "format": [base.quant_type, base.double_quant, base.scales, base.outlier_threshold],
            "compute": base.compute_dtype,
            "budget": budget,
            "kind": inspect_device().kind,
            "versions": {name: version(name) for name in _PACKAGES},
        }
    )
    return cache.entry_folder(cache.MIXES, key) / cache.ENTRY
