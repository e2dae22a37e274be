"""`qlora report`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option, suggest, write_page


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write an HTML page with all charts, in one file.",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the memory charts as one PNG image.",
)
@click.option(
    "--measure-before",
    is_flag=True,
    help="Run some steps of full fine-tuning on the same data, if they fit in memory, and compare "
    "LoRA with this measurement instead of with the plan.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Allow --html and --png to overwrite a file that is not a report. The files of a run are "
    "never overwritten.",
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
    """Show memory, training curves and timings of a run.

    RUN is a run's folder; the run may have been stopped before its end.
    """
    with fast_import():
        from qlora_cli.jobs import report as job
        from qlora_cli.ui import report as page
        from qlora_cli.ui import tables

    with job_observer() as observer:
        page.check_targets(run, html, png, force=force)
        if measure_before:
            from qlora_cli.jobs import full_finetune_baseline

            full_finetune_baseline.measure(run, observer=observer)
            write_page(run, observer)
        result = job.run(run, html=html, png=png)
        page.write(result)
    emit(result, as_json, tables.report)
    if result.run.get("status") == "done":
        suggest("merge", run, "--out", f"{run}-merged")
