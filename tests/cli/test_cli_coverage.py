"""Every command and every option is used in a test of this folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click

from qlora_cli.cli.main import qlora


def calls() -> Iterator[set[str]]:
    """Yield the words of each `qlora(...)` call in this folder's tests.

    Words of tuples that are passed by name (`*arguments`) are included.
    """
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                yield from _calls(function)


def _calls(function: ast.FunctionDef) -> Iterator[set[str]]:
    tuples = {
        node.targets[0].id: _words(node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id="qlora"), args=args):
                starred = [arg.value for arg in args if isinstance(arg, ast.Starred)]
                named = [value.id for value in starred if isinstance(value, ast.Name)]
                words = [_words(arg) for arg in args] + [tuples.get(name, set()) for name in named]
                yield set[str]().union(*words)


def _words(node: ast.AST) -> set[str]:
    return {
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }


def required_calls(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[set[str]]:
    """Yield the words of each command, and of each command with each of its options."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from required_calls(inner, (*path, name))
        return
    yield set(path)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield {*path, parameter.opts[0]}


def untested(command: click.Command) -> list[set[str]]:
    """Return the required calls that no test makes."""
    tested = list(calls())
    return [words for words in required_calls(command) if not any(words <= call for call in tested)]


def test_every_command_and_every_option_is_tested() -> None:
    assert untested(qlora) == []


def test_an_untested_option_is_found() -> None:
    @click.command()
    @click.option("--unheard-of")
    def plan(unheard_of: str) -> None: ...

    assert untested(click.Group(commands=[plan])) == [{"plan", "--unheard-of"}]
