"""`qlora chat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_cli.cli.adapters import adapter_option, merged_option
from qlora_cli.cli.output import importing, working
from qlora_cli.errors import UsageError

if TYPE_CHECKING:
    from qlora_cli.jobs.generate import Chat

_SWITCH = "/use"


@click.command()
@click.argument("run_or_model")
@adapter_option
@click.option("--use", "name", help="Who answers first: an adapter's name, `run` or `base`.")
@merged_option
def chat(run_or_model: str, adapters: dict[str, Path], name: str | None, merged: bool) -> None:
    """Talk to a run's folder or a model.

    A line `/use NAME` lets another adapter answer from there on; `run` is the run's own, `base`
    none. An empty line or the end of input stops.
    """
    with importing():
        from qlora_cli.jobs import generate as job

    with working() as observer:
        partner = job.open_chat(run_or_model, observer, adapters=adapters, use=name, merged=merged)
    while text := _ask():
        command, _, rest = text.partition(" ")
        if command == _SWITCH:
            _switch(partner, rest.strip())
        else:
            click.echo(partner.say(text))


def _switch(partner: Chat, name: str) -> None:
    """A wrong name is told, and the chat goes on."""
    from qlora_cli.ui import console, failures

    try:
        partner.use(name)
    except UsageError as error:
        failures.show(error, console.messages())
    click.echo(f"{partner.answering} answers", err=True)


def _ask() -> str:
    """The next line; empty at the end of input. The prompt sign goes to stderr."""
    try:
        return str(click.prompt(">", default="", show_default=False, prompt_suffix=" ", err=True))
    except click.Abort:
        # click makes one error of the end of input and of Ctrl-C; a chat ends well with either.
        click.echo(err=True)
        return ""
