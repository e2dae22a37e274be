"""`qlora train`."""

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
    write_page,
)


@click.command()
@recipe_argument
@overrides_argument
@click.option("--resume", is_flag=True, help="Continue the run from its last checkpoint.")
@allow_option
@json_option
def train(
    recipe: str, overrides: tuple[str, ...], resume: bool, allow: tuple[str, ...], as_json: bool
) -> None:
    """Run the fine-tuning job of a recipe.

    RECIPE is a YAML file or the name of a shipped recipe (`qlora recipe list`); a key=value, such
    as train.lr=1e-4, replaces one of its settings. The adapter, checkpoints and the report are
    written to the folder that the setting `output` names.

    The rows are checked first, as by `qlora data`: warnings are shown, an error stops the job with
    exit code 2 before anything is written.

    Ctrl-C finishes the current step, writes a checkpoint and exits with code 130; --resume
    continues from there. A stopped run can be merged and tried, too. With more train.epochs or
    train.steps, --resume extends a finished run.
    """
    from qlora_cli.recipe.shipped import find_recipe

    # The recipe is checked before the slow imports, so that its problems are reported at once.
    path = find_recipe(recipe)
    loaded = recipe_of(path, overrides)
    with fast_import():
        from qlora_cli.jobs import train as job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(loaded, recipe_path=path, resume=resume, observer=observer, allow=allow)
        write_page(result.run, observer)
    emit(result, as_json, tables.train)
    suggest("generate", result.run, "--prompt", "...")
