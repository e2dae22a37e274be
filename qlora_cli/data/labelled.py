"""Labelled texts as rows."""

from __future__ import annotations

from typing import Any

from qlora_cli.data.contents import LabelledText
from qlora_cli.data.row_errors import RowError, check_strings


def from_labelled(fields: dict[str, Any]) -> LabelledText:
    """Return a row of `text`, `label` and perhaps `text_pair`. Raises RowError."""
    check_strings(fields, "text", "text_pair")
    label = fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise RowError("'label' must be a name or a number")
    if isinstance(label, str) and not label.strip():
        raise RowError("'label' is empty")
    second = fields.get("text_pair")
    if not fields["text"].strip() and not (second or "").strip():
        raise RowError("'text' is empty")
    return LabelledText(fields["text"], second, label)
