"""`qlora doctor`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check which features work on this machine.

    Tests the device and its driver, 4-bit and 8-bit quantization on it, the free disk space and the
    installed libraries. Needs no network.
    """
    with fast_import():
        from qlora_cli.jobs import doctor as job
        from qlora_cli.ui import tables

    with job_observer():
        result = job.run()
    emit(result, as_json, tables.doctor)
