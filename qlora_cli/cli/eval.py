"""`qlora eval`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option


@click.command(name="eval")
@click.argument("run_or_model")
@click.option(
    "--data",
    required=True,
    help="Held-out rows: a file or a Hub dataset, in any format that `data.train` accepts.",
)
@json_option
def eval_(run_or_model: str, data: str, as_json: bool) -> None:
    """Compute loss, perplexity and accuracy on held-out rows.

    RUN_OR_MODEL is a run's folder, a model folder, a Hub id or `starter`.
    """
    with fast_import():
        from qlora_cli.jobs import evaluate as job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(run_or_model, data=data, observer=observer)
    emit(result, as_json, tables.evaluation)
