"""`qlora recipe list|show|copy|schema`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit_json
from qlora_cli.errors import UsageError


@click.group()
def recipe() -> None:
    """List, show and copy recipes; print their schema."""


@recipe.command(name="list")
def list_() -> None:
    """Name each shipped recipe and say what it is for."""
    from qlora_cli.recipe.shipped import shipped_recipes, summary

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        click.echo(f"{name:{width}}  {summary(path)}")


@recipe.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe as it stands in its file."""
    from qlora_cli.recipe.shipped import find_recipe

    click.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipe.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path), required=False)
def copy(name: str, destination: Path | None) -> None:
    """Copy a recipe to change it.

    To NAME.yaml in the current folder unless a DESTINATION is given.
    """
    from qlora_cli.recipe.shipped import find_recipe

    source = find_recipe(name)
    target = Path(source.name) if destination is None else destination
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UsageError("is there already and is not overwritten", where=str(target))
    if not target.parent.is_dir():
        raise UsageError("there is no such folder", where=str(target.parent))
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    click.echo(str(target))


@recipe.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from qlora_cli.recipe.describe import json_schema

    emit_json(json_schema())
