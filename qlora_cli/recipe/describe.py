"""The schema in words: what each setting accepts, its default and its meaning.

Meanings are the texts under the fields in `schema.py`, read from its source when somebody asks, so
that they stand in one place and cost nothing when a job starts.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_cli.recipe import schema
from qlora_cli.recipe.schema import Recipe, Section

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}
_BOUNDS = (
    (annotated_types.Ge, "ge", "of at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "of at most"),
    (annotated_types.Lt, "lt", "below"),
)


@dataclass(frozen=True)
class Setting:
    """One key of a recipe. default: as YAML writes it, None where the setting must be given."""

    key: str
    accepts: str
    default: str | None
    meaning: str


def settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the schema."""
    return tuple(_settings(Recipe, ""))


def sections() -> dict[str, type[Section]]:
    """The recipe's sections by name."""
    fields = Recipe.model_fields.items()
    return {name: info.annotation for name, info in fields if _is_section(info.annotation)}  # type: ignore[misc]


def keys() -> tuple[str, ...]:
    """Every dotted key, without what reading the meanings costs."""
    inner = (f"{name}.{key}" for name, cls in sections().items() for key in cls.model_fields)
    return (*inner, *(key for key in Recipe.model_fields if key not in sections()))


def field_at(key: str) -> FieldInfo | None:
    """The field of a dotted key; None where there is no such setting."""
    section, _, name = key.rpartition(".")
    model = sections().get(section) if section else Recipe
    info = model.model_fields.get(name) if model else None
    return None if info is None or _is_section(info.annotation) else info


def accepts(info: FieldInfo) -> str:
    """`4, 8 or 16`; `a number above 0`; `all or a list of texts`."""
    return _join(_alternatives(info.annotation, info.metadata))


def choices(info: FieldInfo) -> tuple[str, ...]:
    """The words that a field accepts, for `did you mean`."""
    return tuple(str(value) for value in _literals(info.annotation))


def takes_list(info: FieldInfo) -> bool:
    """Whether a list is one of the things that a field accepts."""
    return any(get_origin(part) is list for part in (info.annotation, *get_args(info.annotation)))


def meaning(key: str) -> str:
    """The text under a field, on one line."""
    section, _, name = key.rpartition(".")
    model = sections()[section] if section else Recipe
    return _meanings()[model.__name__, name]


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema with every setting's meaning in it."""
    content = Recipe.model_json_schema()
    for name, part in {Recipe.__name__: content, **content["$defs"]}.items():
        for key, setting in part["properties"].items():
            text = _meanings().get((name, key))
            if text is not None:
                setting["description"] = text
    return content


def to_yaml(value: Any) -> str:
    """A default as a recipe writes it: `[q, v]`, `null`, `true`."""
    if isinstance(value, list):
        return f"[{', '.join(map(to_yaml, value))}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _settings(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, info in model.model_fields.items():
        if _is_section(info.annotation):
            yield from _settings(sections()[name], f"{name}.")
        else:
            default = None if info.is_required() else to_yaml(info.default)
            key = prefix + name
            yield Setting(key, accepts(info), default, meaning(key))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


@cache
def _meanings() -> Mapping[tuple[str, str], str]:
    """(class, field) -> the string that stands under the field."""
    found = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for before, after in zip(node.body, node.body[1:], strict=False):
            match before, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str() as text)),
                ):
                    found[node.name, name] = " ".join(text.split())
    return found


def _alternatives(annotation: Any, metadata: Sequence[Any]) -> list[str]:
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
        return ["a list of texts"]
    bounds = [
        f"{word} {getattr(bound, name):g}"
        for kind, name, word in _BOUNDS
        for bound in metadata
        if isinstance(bound, kind)
    ]
    return [" ".join([_KINDS[annotation], " and ".join(bounds)]).strip()]


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    for part in get_args(annotation):
        yield from _literals(part)


def _join(alternatives: Sequence[str]) -> str:
    *first, last = alternatives
    return f"{', '.join(first)} or {last}" if first else last
