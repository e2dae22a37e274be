"""Find every validation error of a recipe, also those that pydantic reports only after others."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_cli.recipe.describe import sections
from qlora_cli.recipe.document import KeyPath
from qlora_cli.recipe.schema import Recipe


def validation_errors(content: dict[str, Any]) -> Iterator[ErrorDetails]:
    """Yield every validation error of `content`, at most one per setting and kind of error.

    Pydantic checks relations between settings only in sections without other errors. So each error
    is removed from a copy of `content` and the rest is validated again, until no new error appears.
    A section with a wrong value is emptied. No further errors are yielded for it, and none for
    relations between sections, because the defaults in it are not what the user wrote.

    Each pass adds a pair of key and error type to `seen`. Keys come from `content` and the schema,
    and error types from the schema, so the number of passes is finite.
    """
    content, emptied = deepcopy(content), set[str]()
    seen = set[tuple[KeyPath, str]]()
    while errors := {key_path(error): error for error in _validate(content)}:
        current = {(path, error["type"]) for path, error in errors.items()}
        if current <= seen:
            return
        seen |= current
        for path, error in errors.items():
            if path[0] not in emptied if path else not emptied:
                yield error
        if () in errors:
            return
        for path, error in errors.items():
            emptied |= _remove_error(content, path, error["type"])


def _validate(content: dict[str, Any]) -> list[ErrorDetails]:
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        return [_as_setting_error(item) for item in error.errors(include_url=False)]
    return []


def _as_setting_error(error: ErrorDetails) -> ErrorDetails:
    """Return an error inside a setting's value, such as one item of a list, as one of the value."""
    is_nested = len(error["loc"]) > 2 and error["loc"][0] in sections()
    if is_nested and error["type"] in ("extra_forbidden", "missing"):
        error["type"] = "value_type"
    return error


def _remove_error(content: dict[str, Any], path: KeyPath, error_type: str) -> set[str]:
    """Change `content` so that one error disappears; return the sections that were emptied."""
    top, *inner = path
    if error_type == "extra_forbidden":
        owner = content[top] if inner else content
        owner.pop(path[-1], None)
        return set()
    if error_type == "missing":
        content[top][path[-1]] = "-"  # Every required setting is a string in a section.
        return set()
    content.pop(top, None)
    if top in sections():
        content[top] = {}
    return {top}


def key_path(error: ErrorDetails) -> KeyPath:
    """Return the path of an error's key, without pydantic's entries for unions and list items."""
    parts = [str(part) for part in error["loc"]]
    return tuple(parts[: 2 if parts and parts[0] in sections() else 1])
