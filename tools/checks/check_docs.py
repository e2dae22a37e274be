"""Checks README.md against the program and the checkout.

    python tools/checks/check_docs.py

The sections that tools/checks/make_docs.py writes are up to date; every local link and path leads
somewhere; every command line shows a command, options, settings and recipes that exist.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import make_docs

from qlora_cli.cli.main import qlora
from qlora_cli.recipe.describe import field_at
from qlora_cli.recipe.shipped import shipped_recipes

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_CODE = re.compile(r"`([^`\n]+)`")
_BLOCK = re.compile(r"^```(?:bash|sh|shell|console|text)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
_OVERRIDE = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)=")


def check(readme: Path) -> list[str]:
    """Every fault of this README; paths are looked for beside it."""
    if not readme.is_file():
        return [f"{readme} is missing"]
    text = readme.read_text(encoding="utf-8")
    return [*_stale(text), *_dead_paths(text, readme.parent), *_wrong_commands(text)]


def _stale(text: str) -> Iterator[str]:
    try:
        fresh = make_docs.fill(text)
    except ValueError as error:
        yield str(error)
        return
    if fresh != text:
        yield "a made section is stale; run python tools/checks/make_docs.py"


def _dead_paths(text: str, root: Path) -> Iterator[str]:
    for path in _LINK.findall(text):
        if not (root / path).exists():
            yield f"the link to {path} leads nowhere"
    tops = {path.name for path in root.iterdir()}
    for word in [word for code in _mentions(text) for word in code.split()]:
        if not _PATH.fullmatch(word) or "/" not in word:
            continue
        # `meta-llama/Llama-3.1-8B` and `runs/mine` are no paths of the checkout.
        if word.split("/")[0] in tops - {"runs"} and not (root / word).exists():
            yield f"{word} does not exist"


def _mentions(text: str) -> Iterator[str]:
    yield from _CODE.findall(_BLOCK.sub("", text))
    yield from _shell_lines(text)


def _wrong_commands(text: str) -> Iterator[str]:
    in_text = [code for code in _CODE.findall(_BLOCK.sub("", text)) if code.startswith("qlora ")]
    for line in [*_shell_lines(text), *in_text]:
        words = _words(line)
        if words[:1] == ["qlora"]:
            for fault in _command_faults(qlora, words[1:]):
                yield f"{line}: {fault}"


def _shell_lines(text: str) -> Iterator[str]:
    """Lines in code blocks that a person types, continued ones joined."""
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            typed = line.removeprefix("$ ").strip()
            if re.match(r"(qlora|tools/|python |\.ci/)", typed):
                yield typed


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []  # A sentence with an apostrophe in it, and no command.


def _command_faults(command: click.Command, words: list[str]) -> Iterator[str]:
    context = click.Context(command)
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        names = words[0].split("|")  # `qlora recipe list|show` names several.
        for name in names:
            inner = command.get_command(context, name)
            if inner is None:
                yield f"there is no command {name}"
            else:
                yield from _command_faults(inner, words[1:])
        return
    params = command.get_params(context)
    options = {name for param in params for name in param.opts}
    takes_settings = "overrides" in {param.name for param in params}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in options:
            yield f"{command.name} has no option {word}"
        override = _OVERRIDE.match(word) if takes_settings else None
        if override and override[1] != "key" and field_at(override[1]) is None:
            yield f"there is no setting {override[1]}"
        if word.startswith("recipes/") and Path(word).stem not in shipped_recipes():
            yield f"there is no shipped recipe {word}"


def main() -> int:
    """Checks the README of the checkout."""
    faults = check(make_docs.README)
    for fault in faults:
        print(fault)
    print(f"docs: {len(faults) or 'no'} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
