"""`qlora doctor`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import emit, json_option, working


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Try the device, its drivers and bitsandbytes: what works here and what does not."""
    from qlora_cli.jobs import doctor as job
    from qlora_cli.ui import tables

    with working():
        result = job.run()
    emit(result, as_json, tables.doctor)
