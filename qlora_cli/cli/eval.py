"""`qlora eval`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import emit, importing, json_option, working


@click.command(name="eval")
@click.argument("run_or_model")
@click.option("--data", required=True, help="Held-out rows, in any format of the recipe.")
@json_option
def eval_(run_or_model: str, data: str, as_json: bool) -> None:
    """Measure loss, perplexity and accuracy on held-out rows."""
    with importing():
        from qlora_cli.jobs import evaluate as job
        from qlora_cli.ui import tables

    with working() as observer:
        result = job.run(run_or_model, data=data, observer=observer)
    emit(result, as_json, tables.evaluation)
