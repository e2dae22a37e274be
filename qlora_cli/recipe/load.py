"""From a YAML file and overrides to a Recipe, or every problem of them at once.

A problem stands where the user wrote it: `file.yaml:12: train.lr` or `override train.lr=fast`.
The validator's own messages are not shown; what a setting accepts is said in the words of
`describe.py`.
"""

from __future__ import annotations

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
    """The recipe in a file, or the shipped one of that name, with overrides applied.

    `{name}` in `output` becomes the file's name without its ending. Raises UsageError where there
    is no such file and RecipeError with all problems of the recipe and of the overrides.
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
    return recipe.model_copy(update={"output": recipe.output.replace(_NAME, file.stem)})


@dataclass
class _Draft:
    """A recipe on its way: what the file and the overrides say, and what is wrong so far."""

    file: Path
    document: Document
    content: dict[str, Any]
    overridden: dict[KeyPath, Override] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def apply(self, override: Override | Problem) -> None:
        """Sets what an override says, or keeps what is wrong with it."""
        if isinstance(override, Problem):
            self.problems.append(override)
            return
        section, _, name = override.key.rpartition(".")
        target = self.content[section] if section else self.content
        if not isinstance(target, dict):
            return  # The file has something else in the section's place, which is reported.
        self.overridden[_path(override.key)] = override
        if override.unset:
            target.pop(name, None)
        else:
            target[name] = override.value

    def validate(self) -> Recipe | None:
        """The recipe; None, with problems, where it has any."""
        faults = _faults(self.content)
        self.problems += [self._problem(fault) for fault in faults if not self._is_dotted(fault)]
        if self.problems:
            return None
        recipe = Recipe.model_validate(self.content)
        unknown = re.findall(r"\{.*?\}", recipe.output.replace(_NAME, ""))
        if unknown:
            what = f"{unknown[0]} stands for nothing"
            self.problems.append(Problem(self.where(("output",)), what, f"{_NAME} is all there is"))
        return recipe

    def where(self, path: KeyPath) -> str:
        """Where a key was written last; the section's place for a key that was not written."""
        if path in self.overridden:
            return f"override {self.overridden[path].text}"
        line = self.document.lines.get(path) or self.document.lines.get(path[:-1] or path)
        key = ".".join(path)
        return f"{self.file}{f':{line}' if line else ''}{f': {key}' if key else ''}"

    def _is_dotted(self, fault: ErrorDetails) -> bool:
        """Whether a missing setting was written as a dotted key, which is reported in its place."""
        return fault["type"] == "missing" and ".".join(_place(fault)) in self.content

    def _problem(self, fault: ErrorDetails) -> Problem:
        path = _place(fault)
        where, key = self.where(path), ".".join(path)
        if fault["type"] == "extra_forbidden":
            return _unknown(path, where)
        if fault["type"] == "missing":
            return Problem(where, "is missing", meaning(key))
        if fault["type"] == "value_error":
            hint = "KEY= on the command line drops what the file says of KEY"
            return Problem(where, str(fault["ctx"]["error"]), hint if self.overridden else None)
        info = field_at(key)
        value = _at(self.content, path)
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
        raise UsageError("is no UTF-8 text, so no recipe", where=str(file)) from error
    except DocumentError as error:
        place = f"{file}:{error.line}" if error.line else str(file)
        raise RecipeError(f"{file} cannot be read", [Problem(place, str(error))]) from error
    content = {} if document.content is None else document.content
    if not isinstance(content, dict):
        what = f"holds {_show(content)} and no settings"
        raise RecipeError(f"{file} is no recipe", [Problem(str(file), what)])
    for name in sections():
        # `train:` with nothing under it says nothing; and what is missing in a section that is
        # missing is reported key by key.
        if content.get(name) is None:
            content[name] = {}
    draft = _Draft(file, document, content)
    for path, line in document.duplicates:
        draft.problems.append(Problem(f"{file}:{line}: {'.'.join(path)}", "is written twice"))
    return draft


def _faults(content: dict[str, Any]) -> Iterator[ErrorDetails]:
    """What the schema finds wrong, one fault a setting, relations between settings included.

    The schema checks relations only in sections without other faults. So what is wrong is taken out
    and the rest checked again, until nothing new comes up. A section with a wrong value is emptied;
    no more faults are reported for it then, nor of relations between sections, because its defaults
    are not what the user meant.

    Each pass adds a pair of key and kind to `seen`. Keys come from `content` and the schema, and
    kinds from the schema, so the number of pairs and with it the number of passes is finite.
    """
    content, emptied = deepcopy(content), set[str]()
    seen = set[tuple[KeyPath, str]]()
    while faults := {_place(fault): fault for fault in _errors(content)}:
        found = {(path, fault["type"]) for path, fault in faults.items()}
        if found <= seen:
            return
        seen |= found
        for path, fault in faults.items():
            if path[0] not in emptied if path else not emptied:
                yield fault
        if () in faults:
            return
        for path, fault in faults.items():
            emptied |= _take_out(content, path, fault["type"])


def _errors(content: dict[str, Any]) -> list[ErrorDetails]:
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _take_out(content: dict[str, Any], path: KeyPath, kind: str) -> set[str]:
    """Makes one fault disappear; returns what lost more than the fault by it."""
    top, *inner = path
    if kind == "extra_forbidden":
        owner = content[top] if inner else content
        owner.pop(path[-1], None)
        return set()
    if kind == "missing":
        content[top][path[-1]] = "-"  # Every setting that must be given is a text in a section.
        return set()
    content.pop(top, None)
    if top in sections():
        content[top] = {}
    return {top}


def _unknown(path: KeyPath, where: str) -> Problem:
    """The problem of a key that the schema does not have at this place."""
    key = ".".join(path)
    if len(path) == 1 and "." in key and field_at(key) is not None:
        section, _, name = key.rpartition(".")
        hint = f"write `{section}: {{{name}: ...}}` instead"
        return Problem(where, "a dotted key is not allowed in a recipe file", hint)
    return Problem(where, "unknown setting", nearest_key(key))


def _path(key: str) -> KeyPath:
    """The path of a setting's dotted key. A key of a file may hold dots itself."""
    return tuple(key.split("."))


def _place(fault: ErrorDetails) -> KeyPath:
    """The path of a fault's key, without what the validator adds for unions and list items."""
    parts = [str(part) for part in fault["loc"]]
    return tuple(parts[: 2 if parts and parts[0] in sections() else 1])


def _at(content: dict[str, Any], path: KeyPath) -> Any:
    value: Any = content
    for part in path:
        value = value[part]
    return value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    return repr(value) if isinstance(value, str) else to_yaml(value)
