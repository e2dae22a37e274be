"""`qlora recipe list|show|copy|schema`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.arguments import complete_recipe
from qlora_cli.cli.output import echo, emit_json
from qlora_cli.errors import UsageError


@click.group()
def recipe() -> None:
    """List, show and copy recipes, and print their JSON schema.

    A recipe is a YAML file that describes a fine-tuning job. Shipped recipes are part of the
    package; every command takes them by name.
    """


@recipe.command(name="list")
def list_() -> None:
    """List the shipped recipes with their purpose."""
    from qlora_cli.recipe.shipped import shipped_recipes, summary

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        click.echo(f"{name:{width}}  {summary(path)}")


@recipe.command()
@click.argument("name", shell_complete=complete_recipe)
def show(name: str) -> None:
    """Print a recipe file.

    NAME is the name of a shipped recipe or the path of a file.
    """
    from qlora_cli.recipe.shipped import find_recipe

    echo(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipe.command()
@click.argument("name", shell_complete=complete_recipe)
@click.argument("destination", type=click.Path(path_type=Path), required=False)
def copy(name: str, destination: Path | None) -> None:
    """Copy a recipe file, to edit the copy.

    NAME is the name of a shipped recipe or the path of a file. DESTINATION is a file or a folder;
    the default is NAME.yaml in the current folder. An existing file is never overwritten.
    """
    from qlora_cli.files.atomic import atomic_file, report_write_errors
    from qlora_cli.recipe.shipped import find_recipe

    source = find_recipe(name)
    target = Path(source.name) if destination is None else destination
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UsageError("already exists and is not overwritten", where=str(target))
    if not target.parent.is_dir():
        raise UsageError("this folder does not exist", where=str(target.parent))
    with report_write_errors("the recipe", target), atomic_file(target) as partial:
        partial.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    click.echo(str(target))
    _report_gated_model(target)


def _report_gated_model(file: Path) -> None:
    """Print on stderr how to get access if the recipe in `file` names a gated model."""
    import yaml

    from qlora_cli.files.hub import gated_hint, is_gated

    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = content.get("model") if isinstance(content, dict) else None
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and is_gated(name):
        click.echo(f"{name} is a gated model: {gated_hint(name)}", err=True)


@recipe.command()
def schema() -> None:
    """Print the JSON schema of recipes.

    Editors use it to complete and check YAML files.
    """
    from qlora_cli.recipe.describe import json_schema

    emit_json(json_schema())
