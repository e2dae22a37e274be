"""`qlora train`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import (
    emit,
    importing,
    json_option,
    overrides_argument,
    working,
    write_page,
)


@click.command()
@click.argument("recipe")
@overrides_argument
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@json_option
def train(recipe: str, overrides: tuple[str, ...], resume: bool, as_json: bool) -> None:
    """Run a recipe's fine-tuning job.

    RECIPE is a YAML file or the name of a shipped recipe; a key=value changes one of its settings.
    Ctrl-C writes a checkpoint and exits 130; --resume goes on from there.
    """
    from qlora_cli.recipe.load import load_recipe
    from qlora_cli.recipe.shipped import find_recipe

    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides)
    # Only now what takes seconds to import: a faulty recipe is told at once.
    with importing():
        from qlora_cli.jobs import train as job
        from qlora_cli.ui import tables

    with working() as observer:
        result = job.run(loaded, recipe_path=path, resume=resume, observer=observer)
        write_page(result.run, observer)
    emit(result, as_json, tables.train)
