"""Writes the generated sections of the documentation, between markers.

    python tools/checks/make_docs.py

`<!-- commands -->` to `<!-- /commands -->` holds the help of every command, `<!-- settings -->` a
table of the recipe's settings, `<!-- recipes -->` a table of the shipped recipes,
`<!-- findings -->` a table of what the data checks find. `PAGES` lists
which page has which section. check_docs.py reports a section that differs from the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from qlora_cli.cli.main import qlora
from qlora_cli.data.finding_codes import CODES
from qlora_cli.recipe.describe import Setting, settings
from qlora_cli.recipe.shipped import shipped_recipes, summary

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 96
"""Columns of a help page."""


def commands() -> str:
    """Return the help of `qlora` and of each command, one code block each."""
    return "\n\n".join(_help(command, name) for name, command in _walk(qlora, "qlora"))


def settings_table() -> str:
    """Return one row per setting: key, accepted values, default, meaning."""
    lines = ["| setting | accepts | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *(_setting_row(setting) for setting in settings())])


def recipes_table() -> str:
    """Return one row per shipped recipe: its name and the first line of its header."""
    lines = ["| recipe | purpose |", "|---|---|"]
    rows = (f"| `{name}` | {summary(path)} |" for name, path in shipped_recipes().items())
    return "\n".join([*lines, *rows])


def findings_table() -> str:
    """Return one row per code of the data checks: its severity, what is found and the remedy."""
    lines = ["| code | severity | what is found | remedy |", "|---|---|---|---|"]
    for code in CODES.values():
        share = f" (in {code.share:.0%} of the rows or more)" if code.share else ""
        lines.append(f"| `{code.name}` | {code.severity} | {code.what}{share} | {code.remedy} |")
    return "\n".join(lines)


SECTIONS: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "settings": settings_table,
    "recipes": recipes_table,
    "findings": findings_table,
}
PAGES: Mapping[str, tuple[str, ...]] = {
    "docs/cli.md": ("commands",),
    "docs/data.md": ("findings",),
    "docs/recipe.md": ("settings", "recipes"),
}
"""Page -> its generated sections."""


def fill(text: str, sections: tuple[str, ...]) -> str:
    """Return `text` with each of `sections` generated anew.

    Raises ValueError that names a section whose pair of markers is not there exactly once.
    """
    for name in sections:
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise ValueError(f"{opening} and {closing} must be there exactly once")
        head, _, rest = text.partition(opening)
        tail = rest.partition(closing)[2]
        text = f"{head}{opening}\n{SECTIONS[name]()}\n{closing}{tail}"
    return text


def _walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _walk(inner, f"{name} {inner.name}")


def context_of(command: click.Command, name: str) -> click.Context:
    """Return a context with the program's own settings.

    click stores the help option of a command with the names of the first context that asks for it,
    so every context of a command needs the same settings.
    """
    options = {**qlora.context_settings, "terminal_width": WIDTH}
    return click.Context(command, info_name=name, **options)


def _help(command: click.Command, name: str) -> str:
    return f"```text\n$ {name} --help\n{command.get_help(context_of(command, name))}\n```"


def _setting_row(setting: Setting) -> str:
    default = "must be given" if setting.default is None else f"`{setting.default}`"
    cells = (f"`{setting.key}`", setting.accepts, default, setting.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> None:
    """Rewrite the generated sections of every page in `PAGES`."""
    for page, sections in PAGES.items():
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), sections), encoding="utf-8")


if __name__ == "__main__":
    main()
