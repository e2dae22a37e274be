"""Options of the commands that answer with one of several adapters."""

from __future__ import annotations

from pathlib import Path

import click


def _by_name(_: click.Context, __: click.Parameter, words: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise click.BadParameter(f"{word!r} is not NAME=DIR")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice")
        found[name] = Path(folder)
    return found


adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    callback=_by_name,
    help="A run's folder or an adapter in PEFT's format to put on the base; may be repeated.",
)
merged_option = click.option(
    "--merged",
    is_flag=True,
    help="Add the adapter that answers into the weights, in memory; needs a 16-bit base.",
)
