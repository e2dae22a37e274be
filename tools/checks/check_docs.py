"""Checks the documentation against the program and the checkout.

    python tools/checks/check_docs.py

Checked are README.md, CONTRIBUTING.md, CHANGELOG.md and docs/*.md: generated sections are up to
date; every local link and path exists; every command line uses commands, options, settings and
recipes that exist; docs/architecture.md lists exactly the folders of the package, in the order of
check_layers.py; README.md has at most 150 lines.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import check_layers
import click
import make_docs

from qlora_cli.cli.main import qlora
from qlora_cli.recipe.describe import field_at
from qlora_cli.recipe.shipped import shipped_recipes

README_LINES = 150
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_CODE = re.compile(r"`([^`\n]+)`")
_BLOCK = re.compile(r"^```(?:bash|sh|shell|console|text)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
_OVERRIDE = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)=")
_LAYER = re.compile(r"^\| `(\w+)(?:/|\.py)`", re.MULTILINE)


def check(root: Path) -> list[str]:
    """Return every fault of the pages in the checkout at `root`."""
    required = [root / "README.md", *(root / page for page in make_docs.PAGES)]
    missing = [f"{path.relative_to(root)} is missing" for path in required if not path.is_file()]
    pages = sorted({*root.glob("*.md"), *root.glob("docs/*.md")})
    return missing + [
        f"{page.relative_to(root)}: {fault}" for page in pages for fault in check_page(page, root)
    ]


def check_page(page: Path, root: Path) -> Iterator[str]:
    """Yield every fault of one page. root: the checkout, against which paths are checked."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(root).as_posix()
    yield from _stale(text, make_docs.PAGES.get(name, ()))
    yield from _dead_paths(text, page.parent, root)
    yield from _wrong_commands(text)
    if name == "README.md" and len(text.splitlines()) > README_LINES:
        yield f"it has {len(text.splitlines())} lines; {README_LINES} are allowed"
    if name == "docs/architecture.md":
        yield from _wrong_layers(text)


def _stale(text: str, sections: tuple[str, ...]) -> Iterator[str]:
    try:
        fresh = make_docs.fill(text, sections)
    except ValueError as error:
        yield str(error)
        return
    if fresh != text:
        yield "a generated section is stale; run python tools/checks/make_docs.py"


def _dead_paths(text: str, folder: Path, root: Path) -> Iterator[str]:
    for path in _LINK.findall(text):
        if not (folder / path).exists():
            yield f"the link to {path} leads nowhere"
    tops = {path.name for path in root.iterdir()}
    for word in [word for code in _mentions(text) for word in code.split()]:
        if not _PATH.fullmatch(word) or "/" not in word:
            continue
        # `meta-llama/Llama-3.1-8B` and `runs/mine` are no paths of the checkout.
        is_placeholder = Path(word).stem.isupper()  # `qlora_cli/tasks/NAME.py`
        in_checkout = word.split("/")[0] in tops - {"runs"}
        if in_checkout and not is_placeholder and not (root / word).exists():
            yield f"{word} does not exist"


def _wrong_layers(text: str) -> Iterator[str]:
    """Compare the first column of the layer table with the layers that check_layers.py enforces."""
    documented = _LAYER.findall(text)
    enforced = [layer for layers in check_layers.LAYERS for layer in layers]
    if documented != enforced:
        yield f"its layer table lists {documented}; check_layers.py enforces {enforced}"


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
    """Yield the lines in code blocks that a person types, with continued lines joined."""
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
    context = make_docs.context_of(command, command.name or "")
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if words[0].isupper():  # `qlora COMMAND --help`
            return
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
    """Check the pages of the checkout; return the exit code."""
    faults = check(make_docs.ROOT)
    for fault in faults:
        print(fault)
    print(f"docs: {len(faults) or 'no'} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
