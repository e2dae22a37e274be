"""`qlora quickstart`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option, suggest, write_page


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/quickstart"),
    show_default=True,
    help="Folder for the run and the merged model; the files of an earlier quickstart in it are "
    "replaced.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace the folders `run` and `merged` in it even if they contain other files.",
)
@json_option
def quickstart(out: Path, force: bool, as_json: bool) -> None:
    """Plan, train, merge and verify a small model, offline.

    Shows the complete workflow in minutes, on the base model that is embedded in the package. Needs
    no network and no GPU.
    """
    with fast_import():
        from qlora_cli.jobs import quickstart as job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(out=out, observer=observer, force=force)
        write_page(result.train.run, observer)
    emit(result, as_json, tables.quickstart)
    suggest("recipe", "list")
