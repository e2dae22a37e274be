"""`qlora chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_cli.cli.adapters import adapter_option, merged_option
from qlora_cli.cli.arguments import run_or_model_argument
from qlora_cli.cli.output import echo, fast_import, job_observer
from qlora_cli.cli.sampling import sampling_options, system_option
from qlora_cli.cli.step import at_step, step_option
from qlora_cli.errors import QloraError

if TYPE_CHECKING:
    from qlora_cli.jobs.chat import Chat

_HELP = """\
/reset          start the conversation over
/system TEXT    set the system prompt (none without TEXT) and start over
/use NAME       answer with another adapter ({names}) and start over
/help           show these lines
Ctrl-C stops an answer. An empty line or Ctrl-D ends the chat."""


@click.command()
@run_or_model_argument
@system_option
@sampling_options(max_new_tokens=512, seed=None)
@step_option
@adapter_option
@click.option(
    "--use",
    "name",
    metavar="NAME",
    help="Adapter to start with: a NAME from --adapter, `run` for the run's own adapter, `base` "
    "for none.  [default: the first adapter]",
)
@merged_option
def chat(
    run_or_model: str,
    system: str | None,
    step: int | None,
    adapters: dict[str, Path],
    name: str | None,
    merged: bool,
    **sampling: Any,
) -> None:
    """Chat with a run or a model in the terminal.

    RUN_OR_MODEL is a run's folder, a model folder, a Hub id or `starter`. Its tokenizer must have a
    chat template.

    Lines that begin with `/` are commands: `/reset` starts the conversation over, `/system TEXT`
    sets the system prompt, `/use NAME` switches to another adapter (NAME is as for --use), `/help`
    lists them. Ctrl-C stops an answer. An empty line or the end of the input ends the chat.
    """
    with fast_import():
        from qlora_cli.jobs import chat as job
        from qlora_cli.jobs.text_generator import Sampling

    with job_observer() as observer:
        session = job.open_chat(
            str(at_step(run_or_model, step)),
            observer,
            sampling=Sampling(**sampling),
            system=system,
            adapters=adapters,
            use=name,
            merged=merged,
        )
    _message(f"{run_or_model}, {session.current_adapter} answers. /help lists the commands.")
    while text := _read_line():
        if text.startswith("/"):
            _run_command(session, text)
        else:
            _reply(session, text)


def _reply(session: Chat, text: str) -> None:
    """Print the answer while it is generated. Ctrl-C stops it; an error is reported."""
    try:
        answer = session.reply(text, lambda piece: echo(piece, end=""))
    except KeyboardInterrupt:
        click.echo()
        _message("stopped")
    except QloraError as error:
        _report(error)
        _message("/reset starts the conversation over")
    else:
        click.echo()
        if not answer:
            _message("the answer is empty; the first token ended it")


def _run_command(session: Chat, text: str) -> None:
    """Run a line that begins with `/`. A wrong one is reported, and the chat continues."""
    command, _, argument = text.partition(" ")
    commands: dict[str, Callable[[str], str]] = {
        "/help": lambda _: _HELP.format(names=", ".join(session.adapters)),
        "/reset": lambda _: _reset(session),
        "/system": lambda prompt: _set_system(session, prompt),
        "/use": lambda name: _use_adapter(session, name),
    }
    if command not in commands:
        _message(f"there is no command {command}; /help lists them")
        return
    try:
        _message(commands[command](argument.strip()))
    except QloraError as error:
        _report(error)
        _message(f"{session.current_adapter} answers")


def _reset(session: Chat) -> str:
    session.reset()
    return "the conversation starts over"


def _set_system(session: Chat, prompt: str) -> str:
    session.set_system(prompt)
    done = "the system prompt is set" if prompt else "there is no system prompt now"
    return f"{done}; the conversation starts over"


def _use_adapter(session: Chat, name: str) -> str:
    had_messages = bool(session.messages)
    session.use_adapter(name)
    starts_over = had_messages and not session.messages
    return f"{'the conversation starts over; ' * starts_over}{session.current_adapter} answers"


def _report(error: QloraError) -> None:
    from qlora_cli.ui import console, failures

    failures.show(error, console.messages())


def _message(text: str) -> None:
    echo(text, err=True)


def _read_line() -> str:
    """Return the next line of the input, empty at its end. The prompt is written to stderr.

    One Ctrl-C discards the line, a second one ends the input.
    """
    for message in ("Ctrl-C again, an empty line or Ctrl-D ends the chat", ""):
        try:
            click.echo(">", nl=False, err=True)
            # A line editor redraws its own prompt only.
            return input(" ") if sys.stdout.isatty() else _piped_line()
        except EOFError:
            break
        except KeyboardInterrupt:
            click.echo(err=True)
            if message:
                _message(message)
    click.echo(err=True)
    return ""


def _piped_line() -> str:
    click.echo(" ", nl=False, err=True)
    return input()
