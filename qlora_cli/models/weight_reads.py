"""Finds the linears whose weights are read by the code of their parent, and not by a call.

A packed weight or an adapter would be missed there: Mamba passes the weight of `out_proj` to a
fused kernel. A branch that the model's settings exclude does not count, such as BLOOM's for
`pretraining_tp` above 1.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import nn


def read_weights(module: nn.Module) -> set[str]:
    """Return the names of the children whose `weight` the methods of `module` may read."""
    kind: Any = type(module)
    if not kind.__module__.startswith("transformers."):
        return set()
    return {
        name
        for name, tests in _reads(kind)
        if not any(_is_excluded(test, wanted, module) for test, wanted in tests)
    }


_NEVER_PASSED = {"query_states": None}
"""Arguments that no model passes to its blocks: only DeBERTa's head for pre-training does."""
_Tests = tuple[tuple[str, bool], ...]


@cache
def _reads(kind: Any) -> tuple[tuple[str, _Tests], ...]:
    """Return (child's name, tests on the way to the read and their results) of each read."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    return tuple(_reads_in(tree, ()))


def _reads_in(node: ast.AST, tests: _Tests) -> Iterator[tuple[str, _Tests]]:
    if isinstance(node, ast.FunctionDef) and node.name == "__init__":
        return
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        yield from _reads_in(node.test, tests)
        yield from _reads_of(node.body, (*tests, (test, True)))
        yield from _reads_of(node.orelse, (*tests, (test, False)))
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        owner = node.value
        is_child = isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name)
        if is_child and owner.value.id == "self":  # type: ignore[attr-defined]
            yield owner.attr, tests  # type: ignore[attr-defined]
    yield from _reads_of(list(ast.iter_child_nodes(node)), tests)


def _reads_of(nodes: Sequence[ast.AST], tests: _Tests) -> Iterator[tuple[str, _Tests]]:
    for node in nodes:
        yield from _reads_in(node, tests)


def _is_excluded(test: str, wanted: bool, module: nn.Module) -> bool:
    """Return whether a test of the module's own settings has another result than `wanted`."""
    try:
        names = {"self": module, **_NEVER_PASSED}
        return bool(eval(test, {"__builtins__": {}}, names)) is not wanted
    except Exception:  # The test needs more than the module, such as an argument.
        return False
