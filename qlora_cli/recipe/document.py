"""A recipe's YAML as plain values with the line of each key.

Scalars are read by the core schema of YAML 1.2 and not by PyYAML's 1.1, in which `2e-4` is text,
`on` and `no` are truth values, `1:30` is ninety and `010` is eight. Aliases are refused: a recipe
says what it says where it says it.
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
    """SafeLoader with the scalars of YAML 1.2 and no others."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "a recipe has no aliases; write the value out", mark)
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
for _tag, _pattern, _first in _SCALARS:
    # The first pattern that matches decides, so integers stand before floats.
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(_INT, _construct_int)
_Loader.add_constructor(_FLOAT, _construct_float)


class DocumentError(ValueError):
    """Text that is no YAML. line: counted from 1, None where the parser does not say."""

    def __init__(self, what: str, line: int | None) -> None:
        super().__init__(what)
        self.line = line


@dataclass
class Document:
    """What a file says. duplicates: (key, line) of keys that were written before."""

    content: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    duplicates: list[tuple[KeyPath, int]] = field(default_factory=list)


def read_document(text: str) -> Document:
    """The values of a YAML text and where they stand.

    Raises DocumentError where the text is no YAML.
    """
    try:
        return _values(_Loader(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        what = error.problem or error.context or "this is no YAML"
        raise DocumentError(what, mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        raise DocumentError("it holds characters that YAML does not allow", None) from error


def read_value(text: str) -> Any:
    """One value, as an override writes it: `2e-4`, `[q, v]`, `null`.

    Raises DocumentError where the text is no YAML.
    """
    return read_document(text).content


def _values(loader: _Loader) -> Document:
    document = Document(content=None)
    root = loader.get_single_node()
    if root is not None:
        document.content = _value(loader, root, (), document)
    return document


def _value(loader: _Loader, node: yaml.Node, path: KeyPath, document: Document) -> Any:
    document.lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [
            _value(loader, item, (*path, str(i)), document) for i, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, document)
    return loader.construct_object(node)


def _mapping(
    loader: _Loader, node: yaml.MappingNode, path: KeyPath, document: Document
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise DocumentError("a key must be a word", line)
        key = key_node.value
        if key in content:
            document.duplicates.append(((*path, key), line))
        content[key] = _value(loader, value_node, (*path, key), document)
        document.lines[(*path, key)] = line
    return content
