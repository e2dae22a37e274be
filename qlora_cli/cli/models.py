"""`qlora models`."""

from __future__ import annotations

import click

from qlora_cli.cli.arguments import complete_path
from qlora_cli.cli.output import emit, fast_import, job_observer, json_option


@click.command()
@click.argument("where", required=False, metavar="[NAME_OR_FOLDER]", shell_complete=complete_path)
@json_option
def models(where: str | None, as_json: bool) -> None:
    """List the supported model types, or prove one.

    NAME_OR_FOLDER is a hub id, a model's folder or a config.json. A model type that the test suite
    does not cover is proved on a small model of the same type, in seconds on a CPU: logits,
    packing, gradients, quantization, plan and merge are compared with transformers' own. The result
    is kept in the cache.
    """
    with fast_import():
        from qlora_cli.jobs import models as job
        from qlora_cli.ui import models as ui

    with job_observer() as observer:
        result = job.run(where, observer=observer)
    emit(result, as_json, ui.models)
