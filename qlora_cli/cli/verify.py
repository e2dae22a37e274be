"""`qlora verify`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option
from qlora_cli.errors import VerificationFailed


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run that was merged.",
)
@json_option
@click.pass_context
def verify(ctx: click.Context, merged: Path, against: Path, as_json: bool) -> None:
    """Check that a merged model matches the trained model.

    MERGED is a folder that `qlora merge` wrote. Computes every tensor again and compares it, then
    compares the logits of both models on held-out rows. Exits with code 4 if a check fails.
    """
    with fast_import():
        from qlora_cli.jobs import verify as job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(merged, against=against, observer=observer)
    emit(result, as_json, tables.verify)
    if not result.passed:
        ctx.exit(VerificationFailed.exit_code)
