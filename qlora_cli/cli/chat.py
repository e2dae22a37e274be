"""`qlora chat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_cli.cli.adapters import adapter_option, merged_option
from qlora_cli.cli.output import fast_import, job_observer
from qlora_cli.errors import UsageError

if TYPE_CHECKING:
    from qlora_cli.jobs.generate import Chat

_SWITCH_COMMAND = "/use"


@click.command()
@click.argument("run_or_model")
@adapter_option
@click.option(
    "--use",
    "name",
    metavar="NAME",
    help="Adapter to start with: a NAME from --adapter, `run` for the run's own adapter, `base` "
    "for none.  [default: the first adapter]",
)
@merged_option
def chat(run_or_model: str, adapters: dict[str, Path], name: str | None, merged: bool) -> None:
    """Chat with a run or a model in the terminal.

    RUN_OR_MODEL is a run's folder, a model folder, a Hub id or `starter`. Its tokenizer must have a
    chat template.

    The line `/use NAME` switches to another adapter; NAME is as for --use. An empty line or the end
    of the input ends the chat.
    """
    with fast_import():
        from qlora_cli.jobs import generate as job

    with job_observer() as observer:
        session = job.open_chat(run_or_model, observer, adapters=adapters, use=name, merged=merged)
    while text := _read_line():
        command, _, rest = text.partition(" ")
        if command == _SWITCH_COMMAND:
            _switch_adapter(session, rest.strip())
        else:
            click.echo(session.reply(text))


def _switch_adapter(session: Chat, name: str) -> None:
    """Switch to another adapter. An unknown name is reported, and the chat continues."""
    from qlora_cli.ui import console, failures

    try:
        session.use_adapter(name)
    except UsageError as error:
        failures.show(error, console.messages())
    click.echo(f"{session.current_adapter} answers", err=True)


def _read_line() -> str:
    """Return the next line of the input, empty at its end. The prompt is written to stderr."""
    try:
        return str(click.prompt(">", default="", show_default=False, prompt_suffix=" ", err=True))
    except click.Abort:
        # click raises Abort both at the end of the input and for Ctrl-C. Both end the chat.
        click.echo(err=True)
        return ""
