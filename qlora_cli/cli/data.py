"""`qlora data`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import emit, importing, json_option, overrides_argument, working


@click.command()
@click.argument("recipe")
@overrides_argument
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Rows to show token by token.",
)
@json_option
def data(recipe: str, overrides: tuple[str, ...], show: int, as_json: bool) -> None:
    """Show what the model will see, and what is odd about it.

    Tokens, which of them are trained on, and findings about the rows. RECIPE is a YAML file or the
    name of a shipped recipe.
    """
    from qlora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    # Only now what takes seconds to import: a faulty recipe is told at once.
    with importing():
        from qlora_cli.jobs import data as job
        from qlora_cli.ui import tables

    with working():
        result = job.run(loaded, show=show)
    emit(result, as_json, tables.data)
