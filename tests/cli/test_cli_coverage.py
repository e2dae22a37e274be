"""A command or an option without a test of its own fails here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click

from qlora_cli.cli.main import qlora


def calls() -> Iterator[set[str]]:
    """The words of each `qlora(...)` in the tests of this folder, with those of tuples it names."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                yield from _calls(function)


def _calls(function: ast.FunctionDef) -> Iterator[set[str]]:
    beside = {
        node.targets[0].id: _words(node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id="qlora"), args=args):
                named = [arg.value.id for arg in args if isinstance(arg, ast.Starred)]  # type: ignore[attr-defined]
                words = [_words(arg) for arg in args] + [beside.get(name, set()) for name in named]
                yield set[str]().union(*words)


def _words(node: ast.AST) -> set[str]:
    inner = ast.walk(node)
    return {
        one.value for one in inner if isinstance(one, ast.Constant) and isinstance(one.value, str)
    }


def wanted(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[set[str]]:
    """Each command by its words, and with each of its options."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from wanted(inner, (*path, name))
        return
    yield set(path)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield {*path, parameter.opts[0]}


def test_every_command_and_every_option_is_tried() -> None:
    tried = list(calls())
    untried = [words for words in wanted(qlora) if not any(words <= call for call in tried)]
    assert untried == []


def test_the_guard_notices_what_is_not_tried() -> None:
    @click.command()
    @click.option("--unheard-of")
    def plan(unheard_of: str) -> None: ...

    tried = list(calls())
    group = click.Group(commands=[plan])
    assert [words for words in wanted(group) if not any(words <= call for call in tried)] == [
        {"plan", "--unheard-of"}
    ]
