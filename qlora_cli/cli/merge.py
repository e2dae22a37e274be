"""`qlora merge`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from qlora_cli.cli.output import emit, importing, json_option, working


def _weighted(
    _: click.Context, __: click.Parameter, words: tuple[str, ...]
) -> list[tuple[Path, float]]:
    return [_other(word) for word in words]


def _other(word: str) -> tuple[Path, float]:
    """A folder's own name may hold a =, too."""
    folder, equals, number = word.rpartition("=")
    if not equals or Path(word).exists():
        return Path(word), 1.0
    try:
        weight = float(number)
    except ValueError:
        raise click.BadParameter(f"{number!r} is no weight; write OTHER or OTHER=0.5") from None
    return Path(folder), _finite(weight)


def _own(_: click.Context, __: click.Parameter, weight: float) -> float:
    return _finite(weight)


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise click.BadParameter(f"{weight} is no weight")
    return weight


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of the written weights; unless given float16, or bfloat16 where that overflows.",
)
@click.option(
    "--base",
    type=click.Choice(["original", "dequantized", "auto"]),
    default="auto",
    show_default=True,
    help="Add the adapter to the base's own weights, or to the ones it was trained on.",
)
@click.option(
    "--weight", default=1.0, show_default=True, callback=_own, help="Of the adapter of RUN."
)
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="OTHER[=WEIGHT]",
    callback=_weighted,
    help="Another run, or an adapter in PEFT's format, to add on the same base; repeatable.",
)
@click.option(
    "--gguf",
    type=click.Choice(["f16", "q8_0"]),
    help="Write a GGUF file for llama.cpp too; needs the `gguf` extra.",
)
@json_option
def merge(
    run: Path,
    out: Path,
    dtype: str | None,
    base: str,
    weight: float,
    others: tuple[tuple[Path, float], ...],
    gguf: str | None,
    as_json: bool,
) -> None:
    """Write a checkpoint with the adapter of RUN merged in."""
    with importing():
        from qlora_cli.jobs import merge as job
        from qlora_cli.ui import tables

    with working() as observer:
        result = job.run(
            run,
            out=out,
            dtype=dtype,
            base=base,
            observer=observer,
            weight=weight,
            others=others,
            gguf=gguf,
        )
    emit(result, as_json, tables.merge)
