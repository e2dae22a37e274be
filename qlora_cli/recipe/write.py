"""Write a recipe as YAML text, with the reason of each setting as a comment above it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_cli.recipe.describe import sections, to_yaml
from qlora_cli.recipe.document import DocumentError, read_value
from qlora_cli.recipe.resolve import Choice
from qlora_cli.recipe.schema import Recipe

_WIDTH = 96
_INDENT = "  "


def recipe_text(header: Sequence[str], choices: Sequence[Choice]) -> str:
    """Return the text of a recipe file that sets the chosen settings and no others.

    header: paragraphs of the comment at the top; the first sentence is the recipe's purpose.
    choices: settings in the order of the file, those of a section together; a choice with an empty
    reason gets no comment.
    """
    lines = []
    for number, paragraph in enumerate(header):
        lines += ["#"] if number else []
        lines += _comment(paragraph, "")
    section = ""
    for choice in choices:
        name, _, key = choice.key.rpartition(".")
        if name != section:
            lines += [f"{name}:"] if name else []
            section = name
        indent = _INDENT if name else ""
        lines += _comment(choice.reason, indent)
        lines.append(f"{indent}{key}: {yaml_value(choice.value)}")
    return "\n".join(lines) + "\n"


def recipe_of(choices: Sequence[Choice]) -> Recipe:
    """Return the recipe with the chosen settings. Raises pydantic's ValidationError."""
    content: dict[str, Any] = {name: {} for name in sections()}
    for choice in choices:
        section, _, key = choice.key.rpartition(".")
        (content[section] if section else content)[key] = choice.value
    return Recipe.model_validate(content)


def yaml_value(value: Any) -> str:
    """Return a value in YAML, so that `read_value` returns the same value.

    A string is quoted if it would be read as something else.
    """
    if isinstance(value, list):
        return f"[{', '.join(_quoted(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_quoted(key)}: {_quoted(value[key])}' for key in value)}}}"
    plain = to_yaml(value)
    return plain if not isinstance(value, str) or _reads_as(plain, value) else _quoted(value)


def _reads_as(text: str, value: str) -> bool:
    try:
        return bool(read_value(text) == value) and "\n" not in text
    except DocumentError:
        return False


def _quoted(value: Any) -> str:
    """Return an item of a list or a mapping, in which commas and brackets have a meaning."""
    is_word = isinstance(value, str) and value.replace("_", "a").isalpha() and value.isascii()
    if isinstance(value, str) and not (is_word and _reads_as(value, value)):
        return json.dumps(value, ensure_ascii=False)
    return yaml_value(value)


def _comment(text: str, indent: str) -> Iterator[str]:
    lead = f"{indent}# "
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=lead,
        subsequent_indent=lead,
        break_long_words=False,
        break_on_hyphens=False,
    )
