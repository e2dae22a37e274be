"""Load a recipe: YAML file plus overrides -> Recipe, or one error with every problem.

Each problem names the place where the user wrote the value: `file.yaml:12: train.lr` or
`override train.lr=fast`. Pydantic's own messages are not shown; `describe.py` names the accepted
values of a setting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from qlora_cli.errors import Problem, RecipeError, UsageError
from qlora_cli.recipe.describe import accepts, choices, field_at, meaning, sections, to_yaml
from qlora_cli.recipe.document import Document, DocumentError, KeyPath, read_document
from qlora_cli.recipe.override import Override, parse_override
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.section import NoEffect
from qlora_cli.recipe.shipped import find_recipe
from qlora_cli.recipe.suggest import nearest_key, nearest_word
from qlora_cli.recipe.validation import key_path, validation_errors

_NAME = "{name}"


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and the settings that were dropped because an override makes them useless.

    dropped: dotted key -> one line for the user that gives the reason.
    """

    recipe: Recipe
    dropped: dict[str, str]


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe. See `load_with_dropped`, which also returns what was dropped."""
    return load_with_dropped(path, overrides).recipe


def load_with_dropped(
    path: Path | str, overrides: Sequence[str] = (), may_drop: Collection[str] = ()
) -> LoadedRecipe:
    """Load and validate a recipe. Drop settings of the file that an override makes useless.

    With `adapter.method=full`, for example, the file's `adapter.rank` has no effect.

    path: a YAML file, or the name of a shipped recipe. overrides: `dotted.key=value` texts; a later
    one replaces an earlier one. may_drop: keys of overrides that may be dropped as well. `{name}`
    in `output` becomes the file name without its suffix.

    Raises UsageError if there is no such file, and RecipeError with every problem of the recipe and
    of the overrides.
    """
    file = find_recipe(path)
    draft = _read(file)
    for text in overrides:
        draft.apply(parse_override(text))
    draft.drop_useless(may_drop)
    recipe = draft.validate()
    if recipe is None or draft.problems:
        number = len(draft.problems)
        what = f"{file} has {'a problem' if number == 1 else f'{number} problems'}"
        raise RecipeError(what, draft.problems)
    output = os.path.expanduser(recipe.output.replace(_NAME, file.stem))
    return LoadedRecipe(recipe.model_copy(update={"output": output}), draft.dropped)


@dataclass
class _Draft:
    """A recipe that is not validated yet.

    content: values of the file with the overrides applied.
    overridden: the last override of each key.
    problems: problems found so far.
    dropped: key of each setting that was dropped -> the reason.
    """

    file: Path
    document: Document
    content: dict[str, Any]
    overridden: dict[KeyPath, Override] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

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

    def drop_useless(self, may_drop: Collection[str]) -> None:
        """Remove settings that have no effect because of an override; add them to `dropped`.

        may_drop: keys of overrides that may be removed. Other overrides are not removed: they are
        refused by `validate`.
        """
        while useless := self._useless(may_drop):
            for key, cause in useless.items():
                where, path = self.where(_path(key)), _path(key)
                text = self.overridden[_path(cause)].text
                self.dropped[key] = f"{where} is dropped; it has no effect with {text}"
                section, _, name = key.rpartition(".")
                (self.content[section] if section else self.content).pop(name)
                self.overridden.pop(path, None)

    def _useless(self, may_drop: Collection[str]) -> dict[str, str]:
        """Return key of a setting without effect -> key of the override that is the cause."""
        for error in validation_errors(self.content):
            fault = error.get("ctx", {}).get("error")
            if not isinstance(fault, NoEffect):
                continue
            useless = {
                key: cause
                for key, cause in fault.causes.items()
                if _path(cause) in self.overridden
                # Of two overrides that exclude each other, none is dropped.
                and (
                    _path(key) not in self.overridden
                    or (key in may_drop and cause not in fault.causes)
                )
            }
            if useless:
                return useless
        return {}

    def validate(self) -> Recipe | None:
        """Return the recipe, or None if it has problems; these are added to `problems`."""
        errors = validation_errors(self.content)
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
        return error["type"] == "missing" and ".".join(key_path(error)) in self.content

    def _problem(self, error: ErrorDetails) -> Problem:
        path = key_path(error)
        where, key = self.where(path), ".".join(path)
        info = field_at(key)
        if error["type"] == "extra_forbidden":
            return _unknown_key(path, where)
        if error["type"] == "value_error":
            fault = error["ctx"]["error"]
            causes = map(_path, fault.causes if isinstance(fault, NoEffect) else ())
            if override := next((key for key in causes if key in self.overridden), None):
                return Problem(self.where(override), str(fault))
            return self._contradiction(path, str(fault))
        if error["type"] == "missing":
            return Problem(where, "is missing", meaning(info) if info else None)
        value = _value_at(self.content, path)
        if info is None:
            return Problem(where, f"is {_show(value)}; it must be a section of settings")
        accepted = accepts(info)
        is_mapping = isinstance(value, dict) and accepted.startswith("a mapping")
        found = "has an item that is not accepted" if is_mapping else f"is {_show(value)}"
        what = f"{found}; it must be {accepted}"
        return Problem(where, what, nearest_word(str(value), choices(info)))

    def _contradiction(self, path: KeyPath, what: str) -> Problem:
        """Return the problem of settings that exclude each other, at the place of one of them.

        path: of their section; empty if they are in several. An override is preferred as the place.
        """
        named = _named(path, what)
        overridden = [key for key in named if key in self.overridden]
        of_file = [key for key in named if key in self.document.lines and key not in overridden]
        key = (*overridden, *of_file, path)[0]
        where = self.where(key)
        if what.startswith(name := ".".join(key)):
            where = where.removesuffix(f": {name}")
        hint = "an override KEY= removes the value that the file sets for KEY"
        return Problem(where, what, hint if overridden and of_file else None)


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


def _named(section: KeyPath, text: str) -> list[KeyPath]:
    """Return the paths of the settings that a message names.

    section: of the message, which names settings of this section without it; empty for a message
    about several sections.
    """
    words = re.findall(r"[a-z][a-z_]*(?:\.[a-z][a-z_]*)?", text)
    paths = [(*section, *_path(word)) for word in dict.fromkeys(words)]
    return [path for path in paths if field_at(".".join(path)) is not None]


def _value_at(content: dict[str, Any], path: KeyPath) -> Any:
    value: Any = content
    for part in path:
        value = value[part]
    return value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    return repr(value) if isinstance(value, str) else to_yaml(value)
