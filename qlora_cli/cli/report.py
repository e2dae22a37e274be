"""`qlora report`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, importing, json_option, working, write_page


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a page with curves that needs nothing beside it.",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the memory figures as one picture.",
)
@click.option(
    "--measure-before",
    is_flag=True,
    help="Run real steps of full fine-tuning on the same data, where they fit, and compare "
    "with these instead of their plan.",
)
@click.option(
    "--force", is_flag=True, help="Let --html and --png overwrite a file that is no report."
)
@json_option
def report(
    run: Path,
    html: Path | None,
    png: Path | None,
    measure_before: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Show the memory, curves and timings of a run's folder."""
    with importing():
        from qlora_cli.jobs import report as job
        from qlora_cli.ui import report as page
        from qlora_cli.ui import tables

    with working() as observer:
        if not force:
            page.check_free(run, html, png)
        if measure_before:
            from qlora_cli.jobs import full_finetune_baseline

            full_finetune_baseline.measure(run, observer=observer)
            write_page(run, observer)
        result = job.run(run, html=html, png=png)
        page.write(result)
    emit(result, as_json, tables.report)
