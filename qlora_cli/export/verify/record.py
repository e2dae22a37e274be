"""`verification.json` in a merged folder: the result of its last verification.

It contains the fingerprint of the merged weights, so a result is not taken for other weights that
were written later. `qlora push` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.files.atomic import read_json, write_json
from qlora_cli.files.source import fingerprint

RECORD = "verification.json"
"""Name of the file in a merged folder."""
_FINGERPRINT = "weights_fingerprint"


class _Record(BaseModel):
    """The values of the file that are read back."""

    passed: bool
    weights_fingerprint: str | None = None
    run: str | None = None
    faults: list[str] = []
    explanation: list[str] = []


def write_record(merged: Path, result: Mapping[str, Any], observer: Observer) -> None:
    """Write the result of a verification into the merged folder.

    result: the fields of a `VerifyResult` as JSON values. observer: receives a note if the file
    cannot be written, because the verification itself is valid without it.
    """
    try:
        content = {**_finite(result), _FINGERPRINT: fingerprint(merged)}
    except ModelError:  # The verification reports the damaged weights.
        content = {**_finite(result), _FINGERPRINT: None}
    try:
        write_json(merged / RECORD, content)
    except OSError as fault:
        observer.note(f"{RECORD} could not be written: {fault.strerror or fault}")


def read_record(merged: Path) -> dict[str, Any] | None:
    """Return the result of the last verification of these weights; None if there is none.

    A result of other weights counts as none. Raises ModelError if the file or the weights are
    damaged.
    """
    if not (merged / RECORD).is_file():
        return None
    content = read_json(merged / RECORD, _checked, ModelError)
    stored = content.get(_FINGERPRINT)
    return content if stored is not None and stored == fingerprint(merged, stored) else None


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the file. Raises ValueError if a value has a wrong type."""
    _Record.model_validate(content)
    return content


def _finite(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with null for NaN and infinity, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in result.items()
    }
