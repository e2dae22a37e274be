"""`qlora completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script for command completion in a shell.

    For bash, put `eval "$(qlora completion bash)"` into ~/.bashrc; for zsh, the same with zsh into
    ~/.zshrc; for fish, run `qlora completion fish > ~/.config/fish/completions/qlora.fish`.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has one for each of `_SHELLS`.
    script = kind(ctx.find_root().command, {}, "qlora", "_QLORA_COMPLETE")
    click.echo(script.source_template % script.source_vars())
