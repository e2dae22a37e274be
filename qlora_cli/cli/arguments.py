"""Arguments that several commands share, with what a shell completes for them."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def complete_path(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a path. click does this for arguments that are always a path."""
    return [CompletionItem(incomplete, type="file")]


def complete_recipe(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a shipped recipe, else a path."""
    from qlora_cli.recipe.shipped import shipped_recipes

    names = [name for name in shipped_recipes() if incomplete and name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or complete_path(ctx, parameter, incomplete)


run_or_model_argument = click.argument("run_or_model", shell_complete=complete_path)
recipe_argument = click.argument("recipe", shell_complete=complete_recipe)


def _check_codes(_: click.Context, __: click.Parameter, codes: tuple[str, ...]) -> tuple[str, ...]:
    from qlora_cli.data.finding_codes import CODES

    for code in codes:
        if code not in CODES:
            raise click.BadParameter(f"{code!r} is not one of {', '.join(CODES)}")
    return codes


def _complete_code(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from qlora_cli.data.finding_codes import CODES

    return [CompletionItem(code) for code in CODES if code.startswith(incomplete)]


allow_option = click.option(
    "--allow",
    multiple=True,
    metavar="CODE",
    callback=_check_codes,
    shell_complete=_complete_code,
    help="Accept data findings with this code: training neither stops at them nor shows them. "
    "Can be repeated.",
)
