"""`qlora data`."""

from __future__ import annotations

import click

from qlora_cli.cli.arguments import allow_option, recipe_argument
from qlora_cli.cli.output import (
    emit,
    fast_import,
    job_observer,
    json_option,
    overrides_argument,
    recipe_of,
    suggest,
)
from qlora_cli.errors import DataError


@click.command()
@recipe_argument
@overrides_argument
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Number of rows to show token by token.",
)
@allow_option
@json_option
@click.pass_context
def data(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    show: int,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show a recipe's rows as tokens, and likely problems in them.

    Counts the tokens, marks those that are trained on, and lists findings such as duplicate rows.
    Exits with code 2 if a finding is an error, which also stops training.

    RECIPE is a YAML file or the name of a shipped recipe; a key=value replaces one of its settings.
    """
    # The recipe is checked before the slow imports, so that its problems are reported at once.
    loaded = recipe_of(recipe, overrides)
    with fast_import():
        from qlora_cli.jobs import data as job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(loaded, show=show, observer=observer, allow=allow)
    emit(result, as_json, tables.data)
    if result.stops:
        ctx.exit(DataError.exit_code)
    suggest("plan", recipe, *overrides)
