"""Parse `dotted.key=value` arguments, which set one setting of the recipe each."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from qlora_cli.errors import Problem
from qlora_cli.recipe.describe import (
    choices,
    field_at,
    sections,
    takes_list,
    takes_number,
)
from qlora_cli.recipe.document import DocumentError, read_value
from qlora_cli.recipe.suggest import nearest_key


@dataclass(frozen=True)
class Override:
    """A parsed override.

    text: the argument as the user wrote it.
    key: dotted key.
    value: parsed value.
    unset: True for `key=` without a value, which resets the setting to its default.
    """

    text: str
    key: str
    value: Any
    unset: bool


def parse_override(text: str) -> Override | Problem:
    """Parse one override; return its problem if it is not valid.

    The value is read as YAML. For a list setting, `q,v` is the same as `[q, v]`, unless it also
    accepts any string. For a string setting, a value that YAML reads as another type (`123`,
    `a: b`) stays a string, unless the setting accepts that type, too.
    """
    key, sign, raw = (part.strip() for part in text.partition("="))
    info = field_at(key)
    if not sign:
        what = "is not an override; write it as key=value"
        return Problem(f"override {text}", what, f"{key}=..." if info else None)
    if key in sections():
        names = ", ".join(f"{key}.{name}=..." for name in sections()[key].fields_by_key())
        return Problem(f"override {text}", f"{key} is a section; set one of {names}")
    if info is None:
        return Problem(f"override {text}", f"unknown setting {key}", nearest_key(key))
    try:
        return Override(text, key, _value(raw, info), unset=not raw)
    except DocumentError as error:
        return Problem(f"override {text}", f"the value is not valid YAML: {error}")


def _value(raw: str, info: FieldInfo) -> Any:
    is_mapping = get_origin(info.annotation) is dict
    takes_string = not is_mapping and str in (info.annotation, *get_args(info.annotation))
    try:
        value = read_value(raw)
    except DocumentError:
        if takes_string:
            return raw
        raise
    if takes_string and not isinstance(value, _accepted_types(info)):
        return raw
    is_list_text = takes_list(info) and not takes_string and isinstance(value, str)
    if is_list_text and value not in choices(info):
        return [part.strip() for part in value.split(",")]
    return value


def _accepted_types(info: FieldInfo) -> tuple[type, ...]:
    """Return the types that a string setting accepts in addition to strings, with str and null."""
    accepted: tuple[type, ...] = (str, types.NoneType)
    if takes_list(info):
        accepted += (list,)
    return (*accepted, float) if takes_number(info) else accepted
