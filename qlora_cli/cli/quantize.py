"""`qlora quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.arguments import recipe_argument
from qlora_cli.cli.output import (
    emit,
    fast_import,
    job_observer,
    json_option,
    overrides_argument,
    recipe_of,
    suggest,
)
from qlora_cli.errors import QloraError, UsageError


@click.command()
@recipe_argument
@overrides_argument
@click.option(
    "--budget",
    metavar="SIZE",
    help="Memory of the base, such as 6GiB: linears, embeddings, head and norms, without adapter "
    "and activations.  [default: base.budget, else a tenth more than in 4 bit]",
)
@click.option(
    "--target-kl",
    type=click.FloatRange(min=0, min_open=True),
    metavar="NATS",
    help="Find the smallest base whose KL to the 16-bit model is at most this, instead of using a "
    "budget.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the recipe with the mix as base.overrides to this new file.",
)
@click.option("--force", is_flag=True, help="Replace the file of --out if it exists.")
@json_option
@click.pass_context
def quantize(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    budget: str | None,
    target_kl: float | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what quantization costs, linear by linear.

    Runs the base on at most 64 held-out or training rows, in 16 bit and quantized. Shows the KL
    between both and the part of each linear, and finds the mix of 4, 8 and 16 bit with the lowest
    KL for the memory. base.bits and base.overrides of the recipe are not used.

    RECIPE is a YAML file or the name of a shipped recipe; a key=value replaces one of its settings.
    Exits with code 3 if the base does not fit the budget in 4 bit, and with code 1 if the KL of
    --target-kl is not reached.
    """
    if budget is not None and target_kl is not None:
        raise UsageError("name one of --budget and --target-kl")
    if force and out is None:
        raise UsageError("--force is for --out")
    num_bytes = None if budget is None else _size(budget)
    loaded = recipe_of(recipe, overrides)
    with fast_import():
        from qlora_cli.jobs import quantize as job
        from qlora_cli.ui import quantize as ui

    with job_observer() as observer:
        result = job.run(
            loaded,
            budget=num_bytes,
            target_kl=target_kl,
            out=out,
            observer=observer,
            force=force,
        )
    emit(result, as_json, ui.quantize)
    if not result.reached:
        ctx.exit(QloraError.exit_code)
    if out is not None:
        suggest("train", out)
    elif result.budget_bytes is not None:
        chosen = ("base.bits=auto", f"base.budget={result.budget_bytes}")
        suggest("train", recipe, *overrides, *chosen)
    else:
        target = ("--target-kl", f"{target_kl:g}", "--out", "mixed.yaml")
        suggest("quantize", recipe, *overrides, *target)


def _size(text: str) -> int:
    """Return a size in bytes. Raises UsageError."""
    from qlora_cli.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(str(error), where="--budget") from error
