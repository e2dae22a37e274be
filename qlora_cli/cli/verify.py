"""`qlora verify`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, importing, json_option, working
from qlora_cli.errors import VerificationFailed


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    required=True,
    help="The run that the model was merged from.",
)
@json_option
@click.pass_context
def verify(ctx: click.Context, merged: Path, against: Path, as_json: bool) -> None:
    """Prove that MERGED is the model that was trained.

    Compares the logits of both on held-out rows. Exits 4 when they differ.
    """
    with importing():
        from qlora_cli.jobs import verify as job
        from qlora_cli.ui import tables

    with working() as observer:
        result = job.run(merged, against=against, observer=observer)
    emit(result, as_json, tables.verify)
    if not result.passed:
        ctx.exit(VerificationFailed.exit_code)
