"""The options `--adapter` and `--merged`, which `generate` and `chat` share."""

from __future__ import annotations

from pathlib import Path

import click


def _parse_adapters(
    _: click.Context, __: click.Parameter, arguments: tuple[str, ...]
) -> dict[str, Path]:
    """Parse `NAME=DIR` arguments: name -> folder. Raises BadParameter if one is not valid."""
    adapters: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            raise click.BadParameter(f"{argument!r} is not NAME=DIR")
        if name in adapters:
            raise click.BadParameter(f"{name!r} is given twice")
        adapters[name] = Path(folder)
    return adapters


adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    callback=_parse_adapters,
    help="Load an adapter and call it NAME; DIR is a run's folder or a folder in PEFT's format. "
    "May be repeated.",
)
merged_option = click.option(
    "--merged",
    is_flag=True,
    help="Add the active adapter to the weights in memory; needs a 16-bit base.",
)
