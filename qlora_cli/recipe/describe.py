"""Describe the recipe schema in words: the values, default and description of each setting.

Everything is read from the pydantic models in `schema.py`. Error messages, `qlora recipe schema`
and the documentation use it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.section import Section

_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    types.NoneType: "null",
}
_BOUNDS = (
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "<="),
    (annotated_types.Lt, "lt", "<"),
)


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe, described for people.

    key: dotted key, such as `train.lr`.
    accepts: accepted values, such as `a number > 0`.
    default: default value in YAML; None for a required setting.
    meaning: description on one line.
    """

    key: str
    accepts: str
    default: str | None
    meaning: str


def settings() -> tuple[Setting, ...]:
    """Return every setting in the order of the schema."""
    return tuple(_settings(Recipe, ""))


def sections() -> dict[str, type[Section]]:
    """Return the sections of the recipe: name -> model class."""
    fields = Recipe.model_fields.items()
    return {name: info.annotation for name, info in fields if _is_section(info.annotation)}  # type: ignore[misc]


def keys() -> tuple[str, ...]:
    """Return the dotted key of every setting."""
    inner = (f"{name}.{key}" for name, cls in sections().items() for key in cls.fields_by_key())
    return (*inner, *(key for key in Recipe.model_fields if key not in sections()))


def field_at(key: str) -> FieldInfo | None:
    """Return the pydantic field of a dotted key, or None if there is no such setting."""
    section, _, name = key.rpartition(".")
    model = sections().get(section) if section else Recipe
    info = model.fields_by_key().get(name) if model else None
    return None if info is None or _is_section(info.annotation) else info


def accepts(info: FieldInfo) -> str:
    """Return the values that a field accepts: `4, 8 or 16`, `a number > 0`."""
    return _join(_alternatives(info.annotation, info.metadata))


def choices(info: FieldInfo) -> tuple[str, ...]:
    """Return the words that a field accepts, as text; empty for a field without fixed words."""
    return tuple(str(value) for value in _literals(info.annotation))


def takes_list(info: FieldInfo) -> bool:
    """Return whether a field accepts a list."""
    return any(get_origin(part) is list for part in (info.annotation, *get_args(info.annotation)))


def takes_text(info: FieldInfo) -> bool:
    """Return whether a field accepts any text, or a mapping, which can contain text."""
    parts = (info.annotation, *get_args(info.annotation))
    return any(part is str or get_origin(part) is dict for part in parts)


def takes_number(info: FieldInfo) -> bool:
    """Return whether a field accepts a number with a fraction."""
    parts = (info.annotation, *get_args(info.annotation))
    return any(part is float or get_args(part)[:1] == (float,) for part in parts)


def meaning(info: FieldInfo) -> str:
    """Return the description of a field on one line."""
    return _one_line(info.description or "")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe; each description is on one line."""
    content = Recipe.model_json_schema()
    for part in (content, *content["$defs"].values()):
        for described in (part, *part["properties"].values()):
            if "description" in described:
                described["description"] = _one_line(described["description"])
    return content


def to_yaml(value: Any) -> str:
    """Return a value as a recipe file contains it: `[q, v]`, `null`, `true`."""
    if isinstance(value, list):
        return f"[{', '.join(map(to_yaml, value))}]"
    if isinstance(value, Section):
        value = value.model_dump()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {to_yaml(item)}' for key, item in value.items())}}}"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _settings(model: type[Section], prefix: str) -> Iterator[Setting]:
    for name, info in model.fields_by_key().items():
        if _is_section(info.annotation):
            yield from _settings(sections()[name], f"{name}.")
        else:
            default = None if info.is_required() else to_yaml(info.default)
            yield Setting(prefix + name, accepts(info), default, meaning(info))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _alternatives(annotation: Any, metadata: Sequence[Any]) -> list[str]:
    """Return one text per alternative of a type; metadata: the bounds that apply to all of them."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [
            text for part in get_args(annotation) for text in _alternatives(part, list(metadata))
        ]
    if get_origin(annotation) is Annotated:
        inner, *outer = get_args(annotation)
        bounds = [bound for info in outer for bound in getattr(info, "metadata", [info])]
        return _alternatives(inner, [*metadata, *bounds])
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return [f"a list of {' or '.join(_list_items(item))}"]
    if get_origin(annotation) is dict:
        _, value = get_args(annotation)
        values = "strings" if value is str else f"{_join(_alternatives(value, []))} each"
        return [f"a mapping of strings to {values}"]
    bounds = [
        f"{sign} {getattr(bound, attribute):.12g}"
        for kind, attribute, sign in _BOUNDS
        for bound in metadata
        if isinstance(bound, kind)
    ]
    return [" ".join([_TYPE_NAMES[annotation], " and ".join(bounds)]).strip()]


def _list_items(annotation: Any) -> list[str]:
    """Return the plural of each alternative of a list's items."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    parts = get_args(annotation) or (annotation,)
    return [
        f"{{{', '.join(part.model_fields)}}}" if _is_section(part) else "strings" for part in parts
    ]


def _literals(annotation: Any) -> Iterator[Any]:
    """Yield the values of every Literal inside a type, except those of the items of a list."""
    if get_origin(annotation) is list:
        return
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    for part in get_args(annotation):
        yield from _literals(part)


def _join(alternatives: Sequence[str]) -> str:
    *first, last = alternatives
    return f"{', '.join(first)} or {last}" if first else last
