"""`qlora merge`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option, suggest
from qlora_cli.cli.step import at_step, step_option
from qlora_cli.export.options import (
    AUTO_BASE,
    DEFAULT_DTYPE,
    FALLBACK_DTYPE,
    GGUF_TYPES,
    MERGE_BASES,
    OUTPUT_DTYPES,
)


def _parse_others(
    _: click.Context, __: click.Parameter, arguments: tuple[str, ...]
) -> list[tuple[Path, float]]:
    """Parse `OTHER[=WEIGHT]` arguments: folder and weight of each."""
    return [_parse_other(argument) for argument in arguments]


def _parse_other(argument: str) -> tuple[Path, float]:
    # The name of a folder may contain a "=" itself.
    folder, equals, number = argument.rpartition("=")
    if not equals or Path(argument).exists():
        return Path(argument), 1.0
    try:
        weight = float(number)
    except ValueError:
        raise click.BadParameter(f"{number!r} is not a number; write OTHER or OTHER=0.5") from None
    return Path(folder), _finite(weight)


def _check_weight(_: click.Context, __: click.Parameter, weight: float) -> float:
    return _finite(weight)


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise click.BadParameter(f"the weight is {weight}; it must be finite")
    return weight


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write; it must be empty or must not exist.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(OUTPUT_DTYPES)),
    help=f"Dtype of the written weights.  [default: {DEFAULT_DTYPE}, or {FALLBACK_DTYPE} if the "
    f"model exceeds the range of {DEFAULT_DTYPE}]",
)
@click.option(
    "--base",
    type=click.Choice([*MERGE_BASES, AUTO_BASE]),
    default=AUTO_BASE,
    show_default=True,
    help="Base weights that the adapter is added to: `original` are the weights before "
    "quantization, `dequantized` those that the adapter was trained on, `auto` compares both with "
    "the trained model and chooses one.",
)
@click.option(
    "--weight",
    default=1.0,
    show_default=True,
    callback=_check_weight,
    help="Factor for the adapter of RUN.",
)
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="OTHER[=WEIGHT]",
    callback=_parse_others,
    help="Also add the adapter OTHER, times WEIGHT (default 1); OTHER is a run's folder or a "
    "folder in PEFT's format. May be repeated.",
)
@click.option(
    "--gguf",
    type=click.Choice(list(GGUF_TYPES)),
    help="Also write a GGUF file of this type for llama.cpp. Needs the extra `gguf` of this "
    "package; the types with a k need the extra `llama`, which has llama.cpp's quantizer.",
)
@step_option
@json_option
def merge(
    run: Path,
    out: Path,
    dtype: str | None,
    base: str,
    weight: float,
    others: tuple[tuple[Path, float], ...],
    gguf: str | None,
    step: int | None,
    as_json: bool,
) -> None:
    """Merge a run's adapter into its base and write a checkpoint.

    RUN is a run's folder; a run that was stopped can be merged, too. The result is a model folder
    with safetensors files that is loaded like any other model, without an adapter. Check it with
    `qlora verify`.
    """
    with fast_import():
        from qlora_cli.jobs import merge as job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(
            Path(at_step(run, step)),
            out=out,
            dtype=dtype,
            base=base,
            observer=observer,
            weight=weight,
            others=others,
            gguf=gguf,
        )
    emit(result, as_json, tables.merge)
    suggest("verify", out, "--against", run)
