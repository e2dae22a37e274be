"""`qlora merge`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, json_option, working


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of the written weights; float16 unless given.",
)
@click.option(
    "--base",
    type=click.Choice(["original", "dequantized", "auto"]),
    default="auto",
    show_default=True,
    help="Add the adapter to the base's own weights, or to the ones it was trained on.",
)
@click.option(
    "--gguf",
    type=click.Choice(["f16", "q8_0"]),
    help="Write a GGUF file for llama.cpp too; needs the `gguf` extra.",
)
@json_option
def merge(
    run: Path, out: Path, dtype: str | None, base: str, gguf: str | None, as_json: bool
) -> None:
    """Write a checkpoint with the adapter of RUN merged in."""
    from qlora_cli.jobs import merge as job
    from qlora_cli.ui import tables

    with working() as observer:
        result = job.run(run, out=out, dtype=dtype, base=base, observer=observer, gguf=gguf)
    emit(result, as_json, tables.merge)
