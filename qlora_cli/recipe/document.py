"""Read a recipe's YAML into plain values and the line number of each key.

Scalars follow the core schema of YAML 1.2. PyYAML implements YAML 1.1, in which `2e-4` is a string,
`on` and `no` are booleans, `1:30` is 90 and `010` is 8. Anchors and aliases are refused, so that
each value is written at the place where it is used.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

KeyPath = tuple[str, ...]

_MAX_CHARACTERS, _MAX_KEYS = 1_000_000, 2_000
"""Limits of a recipe. Larger files are no recipes, and parsing them takes minutes."""

_BOOL = "tag:yaml.org,2002:bool"
_FLOAT = "tag:yaml.org,2002:float"
_INT = "tag:yaml.org,2002:int"
_NULL = "tag:yaml.org,2002:null"
_SCALARS = (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads the scalars of YAML 1.2 only."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(
                None, None, "aliases are not allowed in a recipe; write the value", mark
            )
        return super().compose_node(parent, index)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    number = float(loader.construct_scalar(node))
    if math.isinf(number):
        raise ConstructorError(None, None, "the number is too large", node.start_mark)
    return number


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first_characters in _SCALARS:
    # The first pattern that matches is used, so integers must come before floats.
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first_characters)
_Loader.add_constructor(_INT, _construct_int)
_Loader.add_constructor(_FLOAT, _construct_float)


class DocumentError(ValueError):
    """Text that is not valid YAML. line: line number from 1; None if the parser has none."""

    def __init__(self, what: str, line: int | None) -> None:
        super().__init__(what)
        self.line = line


@dataclass
class Document:
    """The values of a YAML text.

    content: values as Python objects.
    lines: line number of each key path, from 1.
    duplicates: path and line number of each key that an earlier line has already set.
    """

    content: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    duplicates: list[tuple[KeyPath, int]] = field(default_factory=list)


def read_document(text: str) -> Document:
    """Parse a YAML text. Raises DocumentError if it is not valid YAML, or too large."""
    if len(text) > _MAX_CHARACTERS:
        raise DocumentError(f"it has more than {_MAX_CHARACTERS:,} characters", None)
    try:
        return _parse(_Loader(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        what = error.problem or error.context or "this is not valid YAML"
        raise DocumentError(what, mark.line + 1 if mark else None) from error
    except RecursionError as error:
        raise DocumentError("its brackets or lists are nested too deeply", None) from error
    except yaml.YAMLError as error:
        raise DocumentError("it contains characters that YAML does not allow", None) from error


def read_value(text: str) -> Any:
    """Parse one value in YAML: `2e-4`, `[q, v]`, `null`.

    Raises DocumentError if it is not valid YAML.
    """
    return read_document(text).content


def _parse(loader: _Loader) -> Document:
    document = Document(content=None)
    root = loader.get_single_node()
    if root is not None:
        document.content = _construct(loader, root, (), document)
    return document


def _construct(loader: _Loader, node: yaml.Node, path: KeyPath, document: Document) -> Any:
    document.lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, item, (*path, str(i)), document) for i, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(loader, node, path, document)
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        kind = node.tag.rpartition(":")[2]
        what = f"{str(node.value)[:40]!r} is not a valid {kind}"
        raise DocumentError(what, node.start_mark.line + 1) from error


def _construct_mapping(
    loader: _Loader, node: yaml.MappingNode, path: KeyPath, document: Document
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise DocumentError("a key must be a plain word", line)
        key = key_node.value
        if len(document.lines) > _MAX_KEYS:
            raise DocumentError(f"it has more than {_MAX_KEYS:,} keys and is not a recipe", line)
        if key in content:
            document.duplicates.append(((*path, key), line))
        content[key] = _construct(loader, value_node, (*path, key), document)
        document.lines[(*path, key)] = line
    return content
