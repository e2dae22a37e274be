"""`qlora plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qlora_cli.cli.output import emit, importing, json_option, overrides_argument, working
from qlora_cli.errors import DoesNotFit

if TYPE_CHECKING:
    from qlora_cli.device import DeviceProfile

_CONTEXT = 512 * 1024**2
"""Assumed, not measured: what a CUDA context and its modules take of a card that is not here."""
_LEAST = 1024**2


@click.command()
@click.argument("recipe")
@overrides_argument
@click.option("--vram", metavar="SIZE", help="Plan for a card that is not here: 24GiB, 8G.")
@click.option("--fit", is_flag=True, help="Find the longest sequence and largest batch.")
@click.option("--compare", is_flag=True, help="Plan other methods on the same data and batch, too.")
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    vram: str | None,
    fit: bool,
    compare: bool,
    as_json: bool,
) -> None:
    """Say what memory a job needs before anything is loaded.

    By phase and by category, from the real job run on imagined tensors. RECIPE is a YAML file or
    the name of a shipped recipe. Exits 3 when the job does not fit.
    """
    from qlora_cli.recipe.load import load_recipe

    profile = None if vram is None else planned_gpu(vram)
    loaded = load_recipe(recipe, overrides)
    # Only now what takes seconds to import: a faulty recipe is told at once.
    with importing():
        from qlora_cli.jobs import plan as job
        from qlora_cli.ui import planned

    with working():
        result = job.run(loaded, device_profile=profile, fit=fit, compare=compare)
    emit(result, as_json, planned.plan)
    if result.fits is False:
        ctx.exit(DoesNotFit.exit_code)


def planned_gpu(vram: str) -> DeviceProfile:
    """A card of that size with what an RTX 4090 can do, the usual consumer card of today."""
    from qlora_cli.device import DeviceProfile
    from qlora_cli.units import parse_bytes

    try:
        capacity = parse_bytes(vram)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--vram") from error
    if capacity < _LEAST:
        raise click.BadParameter(
            f"{vram} is less than any card has; write it with its unit, 24GiB", param_hint="--vram"
        )
    return DeviceProfile(
        kind="cuda",
        name="a planned GPU",
        capacity_bytes=capacity,
        capability=(8, 9),
        multiprocessors=128,
        context_bytes=_CONTEXT,
        is_planned=True,
    )
