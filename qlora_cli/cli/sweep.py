"""`qlora sweep`."""

from __future__ import annotations

import click

from qlora_cli.cli.arguments import allow_option, recipe_argument
from qlora_cli.cli.output import emit, fast_import, job_observer, json_option, suggest


@click.command()
@recipe_argument
@click.argument("settings", nargs=-1, metavar="[key=v1,v2 ...]")
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Train each combination with N seeds, from train.seed upwards.  [default: 1]",
)
@click.option(
    "--random",
    "sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train N combinations of the grid, chosen at random; the choice is the same every time.",
)
@click.option("--resume", is_flag=True, help="Continue the sweep; done runs are not repeated.")
@allow_option
@json_option
def sweep(
    recipe: str,
    settings: tuple[str, ...],
    seeds: int | None,
    sample: int | None,
    resume: bool,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train combinations of settings and compare them.

    RECIPE is a YAML file or the name of a shipped recipe. Values of a setting are separated by
    commas, such as adapter.rank=2,4,8; lists and texts by semicolons, such as
    "adapter.targets=[q];[q,v]". A setting with one value applies to all runs.

    The base is loaded once for all runs that have the same one. Each run gives the same result as
    `qlora train` with its settings. It is a folder in the folder that the setting `output` names,
    next to sweep.json and sweep.png. A run that does not fit the device is skipped.

    Ctrl-C stops the sweep with a checkpoint of the current run; --resume continues it. With more
    values or seeds, --resume adds runs to a sweep.
    """
    from qlora_cli.recipe.grid import make_grid
    from qlora_cli.recipe.shipped import find_recipe

    # The recipe is checked before the slow imports, so that its problems are reported at once.
    path = find_recipe(recipe)
    grid = make_grid(path, settings, seeds, sample)
    with fast_import():
        from qlora_cli.jobs import sweep as job
        from qlora_cli.ui import sweep as table
        from qlora_cli.ui import sweep_figure

    with job_observer() as observer:
        result = job.run(grid, recipe_path=path, resume=resume, observer=observer, allow=allow)
        result = sweep_figure.write(result)
        observer.note(f"figure: {result.plot}")
    emit(result, as_json, table.sweep)
    if result.best is not None:
        best = next(run for run in result.runs if run.settings == result.best.settings)
        suggest("report", result.folder / best.name)
