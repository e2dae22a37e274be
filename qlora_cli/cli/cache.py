"""`qlora cache list|clear`."""

from __future__ import annotations

import click

from qlora_cli.cli.output import emit, fast_import, json_option


@click.group()
def cache() -> None:
    """List or remove what is kept between runs.

    The tokens of large data files and the packed weights of large bases are kept, so that the next
    run with the same rows and tokenizer, or the same base, starts at once. The folder is
    $QLORA_CACHE, else `qlora` in $XDG_CACHE_HOME or ~/.cache. $QLORA_PACKED_LIMIT is the largest
    size of all packed bases together, 50GiB if it is not set. An entry is used only if everything
    that it depends on is the same, so removing it is never necessary and never harmful.
    """


@cache.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List the entries of the cache with their size."""
    _run(False, as_json)


@cache.command()
@json_option
def clear(as_json: bool) -> None:
    """Remove all entries of the cache."""
    _run(True, as_json)


def _run(remove: bool, as_json: bool) -> None:
    with fast_import():
        from qlora_cli.jobs import cache as job
        from qlora_cli.ui import cache as ui

    emit(job.run(remove=remove), as_json, ui.entries)
