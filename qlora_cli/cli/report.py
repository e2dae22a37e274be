"""`qlora report`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, json_option, working


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a page with curves that needs nothing beside it.",
)
@json_option
def report(run: Path, html: Path | None, as_json: bool) -> None:
    """Show the memory, curves and timings of a run's folder."""
    from qlora_cli.jobs import report as job
    from qlora_cli.ui import report as page
    from qlora_cli.ui import tables

    with working():
        result = job.run(run, html=html)
        if html is not None:
            page.write(result, html)
    emit(result, as_json, tables.report)
