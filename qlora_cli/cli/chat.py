"""`qlora chat`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import working


@click.command()
@click.argument("run_or_model")
def chat(run_or_model: str) -> None:
    """Talk to a run's folder or a model.

    An empty line or the end of input stops.
    """
    from qlora_cli.jobs import generate as job

    with working() as observer:
        partner = job.open_chat(run_or_model, observer)
    while text := _ask():
        click.echo(partner.say(text))


def _ask() -> str:
    """The next line; empty at the end of input. The prompt sign goes to stderr."""
    try:
        return str(click.prompt(">", default="", show_default=False, prompt_suffix=" ", err=True))
    except click.Abort:
        # click makes one error of the end of input and of Ctrl-C; a chat ends well with either.
        click.echo(err=True)
        return ""
