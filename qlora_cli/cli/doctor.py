"""`qlora doctor`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import emit, importing, json_option, working


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what works on this machine and what does not.

    Tries the device, its driver, and bitsandbytes' 4 and 8 bit on it.
    """
    with importing():
        from qlora_cli.jobs import doctor as job
        from qlora_cli.ui import tables

    with working():
        result = job.run()
    emit(result, as_json, tables.doctor)
