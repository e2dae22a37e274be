"""`qlora quickstart`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, importing, json_option, working, write_page


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/quickstart"),
    show_default=True,
    help="Folder for the run and the merged model; what an earlier quickstart left is replaced.",
)
@click.option(
    "--force", is_flag=True, help="Replace `run` and `merged` in this folder, whoever wrote them."
)
@json_option
def quickstart(out: Path, force: bool, as_json: bool) -> None:
    """See the whole way on the embedded base, offline, in minutes."""
    with importing():
        from qlora_cli.jobs import quickstart as job
        from qlora_cli.ui import tables

    with working() as observer:
        result = job.run(out=out, observer=observer, force=force)
        write_page(result.train.run, observer)
    emit(result, as_json, tables.quickstart)
