"""Load a recipe: YAML file plus overrides -> Recipe, or one error with every problem.

Each problem names the place where the user wrote the value: `file.yaml:12: train.lr` or
`override train.lr=fast`. Pydantic's own messages are not shown; `describe.py` names the accepted
values of a setting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_cli.errors import Problem, RecipeError, UsageError
from qlora_cli.recipe.describe import accepts, choices, field_at, meaning, sections, to_yaml
from qlora_cli.recipe.document import Document, DocumentError, KeyPath, read_document
from qlora_cli.recipe.override import Override, parse_override
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.shipped import find_recipe
from qlora_cli.recipe.suggest import nearest_key, nearest_word

_NAME = "{name}"


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    path: a YAML file, or the name of a shipped recipe. overrides: `dotted.key=value` texts; a later
    one replaces an earlier one. `{name}` in `output` becomes the file name without its suffix.

    Raises UsageError if there is no such file, and RecipeError with every problem of the recipe and
    of the overrides.
    """
    file = find_recipe(path)
    draft = _read(file)
    for text in overrides:
        draft.apply(parse_override(text))
    recipe = draft.validate()
    if recipe is None or draft.problems:
        number = len(draft.problems)
        what = f"{file} has {'a problem' if number == 1 else f'{number} problems'}"
        raise RecipeError(what, draft.problems)
    output = os.path.expanduser(recipe.output.replace(_NAME, file.stem))
    return recipe.model_copy(update={"output": output})


@dataclass
class _Draft:
    """A recipe that is not validated yet.

    content: values of the file with the overrides applied.
    overridden: the last override of each key.
    problems: problems found so far.
    """

    file: Path
    document: Document
    content: dict[str, Any]
    overridden: dict[KeyPath, Override] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def apply(self, override: Override | Problem) -> None:
        """Apply an override to `content`, or add its problem to `problems`."""
        if isinstance(override, Problem):
            self.problems.append(override)
            return
        section, _, name = override.key.rpartition(".")
        target = self.content[section] if section else self.content
        if not isinstance(target, dict):
            return  # The file has a plain value in place of the section, which is reported.
        self.overridden[_path(override.key)] = override
        if override.unset:
            target.pop(name, None)
        else:
            target[name] = override.value

    def validate(self) -> Recipe | None:
        """Return the recipe, or None if it has problems; these are added to `problems`."""
        errors = _validation_errors(self.content)
        self.problems += [self._problem(error) for error in errors if not self._is_dotted(error)]
        if self.problems:
            return None
        recipe = Recipe.model_validate(self.content)
        unknown = re.findall(r"\{.*?\}", recipe.output.replace(_NAME, ""))
        if unknown:
            what = f"{unknown[0]} is an unknown placeholder"
            hint = f"{_NAME} is the only placeholder"
            self.problems.append(Problem(self.where(("output",)), what, hint))
        return recipe

    def where(self, path: KeyPath) -> str:
        """Return the place where a key was set last, or the place of its section if it was not."""
        if path in self.overridden:
            return f"override {self.overridden[path].text}"
        line = self.document.lines.get(path) or self.document.lines.get(path[:-1] or path)
        key = ".".join(path)
        return f"{self.file}{f':{line}' if line else ''}{f': {key}' if key else ''}"

    def _is_dotted(self, error: ErrorDetails) -> bool:
        """Return whether a missing setting was written as a dotted key, which is its own error."""
        return error["type"] == "missing" and ".".join(_key_path(error)) in self.content

    def _problem(self, error: ErrorDetails) -> Problem:
        path = _key_path(error)
        where, key = self.where(path), ".".join(path)
        info = field_at(key)
        if error["type"] == "extra_forbidden":
            return _unknown_key(path, where)
        if error["type"] == "value_error":
            hint = "an override KEY= removes the value that the file sets for KEY"
            return Problem(where, str(error["ctx"]["error"]), hint if self.overridden else None)
        if error["type"] == "missing":
            return Problem(where, "is missing", meaning(info) if info else None)
        value = _value_at(self.content, path)
        if info is None:
            return Problem(where, f"is {_show(value)}; it must be a section of settings")
        what = f"is {_show(value)}; it must be {accepts(info)}"
        return Problem(where, what, nearest_word(str(value), choices(info)))


def _read(file: Path) -> _Draft:
    try:
        document = read_document(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8 text, so it is not a recipe", where=str(file)) from error
    except DocumentError as error:
        place = f"{file}:{error.line}" if error.line else str(file)
        raise RecipeError(f"{file} cannot be read", [Problem(place, str(error))]) from error
    content = {} if document.content is None else document.content
    if not isinstance(content, dict):
        what = f"contains {_show(content)} and no settings"
        raise RecipeError(f"{file} is not a recipe", [Problem(str(file), what)])
    for name in sections():
        # An empty `train:` is the same as no `train:`. With an empty section in place of a missing
        # one, each of its required settings is reported by its own key.
        if content.get(name) is None:
            content[name] = {}
    draft = _Draft(file, document, content)
    for path, line in document.duplicates:
        draft.problems.append(Problem(f"{file}:{line}: {'.'.join(path)}", "is written twice"))
    return draft


def _validation_errors(content: dict[str, Any]) -> Iterator[ErrorDetails]:
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
    while errors := {_key_path(error): error for error in _validate(content)}:
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


def _unknown_key(path: KeyPath, where: str) -> Problem:
    """Return the problem of a key that the schema does not have at this place."""
    key = ".".join(path)
    if len(path) == 1 and "." in key and field_at(key) is not None:
        section, _, name = key.rpartition(".")
        hint = f"write `{section}: {{{name}: ...}}` instead"
        return Problem(where, "a dotted key is not allowed in a recipe file", hint)
    return Problem(where, "unknown setting", nearest_key(key))


def _path(key: str) -> KeyPath:
    """Return the path of a setting's dotted key. Not for keys of a file, which may contain dots."""
    return tuple(key.split("."))


def _key_path(error: ErrorDetails) -> KeyPath:
    """Return the path of an error's key, without pydantic's entries for unions and list items."""
    parts = [str(part) for part in error["loc"]]
    return tuple(parts[: 2 if parts and parts[0] in sections() else 1])


def _value_at(content: dict[str, Any], path: KeyPath) -> Any:
    value: Any = content
    for part in path:
        value = value[part]
    return value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    return repr(value) if isinstance(value, str) else to_yaml(value)
