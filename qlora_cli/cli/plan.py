"""`qlora plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qlora_cli.cli.output import (
    emit,
    fast_import,
    job_observer,
    json_option,
    overrides_argument,
)
from qlora_cli.errors import DoesNotFit

if TYPE_CHECKING:
    from qlora_cli.device import DeviceProfile

_CONTEXT_BYTES = 512 * 1024**2
"""Reserved for the CUDA context and its modules on a planned GPU; an assumption, not measured."""
_MIN_CAPACITY_BYTES = 1024**2
"""A smaller `--vram` is refused, because its unit was probably forgotten."""


@click.command()
@click.argument("recipe")
@overrides_argument
@click.option(
    "--vram",
    metavar="SIZE",
    help="Plan for a GPU with this much memory, such as 24GiB, instead of for this machine.",
)
@click.option(
    "--fit",
    is_flag=True,
    help="Also find the largest data.seq_len and the largest train.micro_batch that fit.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Also plan full fine-tuning and LoRA on a 16, 8 and 4-bit base with the same batches.",
)
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
    """Compute the memory that a job needs, before it runs.

    Performs a dry run of the job: the same code on tensors without data. Shows the peak memory of
    each phase by category. Reads only the config of the base model and needs no GPU.

    RECIPE is a YAML file or the name of a shipped recipe (`qlora recipe list`); a key=value, such
    as data.seq_len=512, replaces one of its settings. Exits with code 3 if the job does not fit.
    """
    from qlora_cli.recipe.load import load_recipe

    # The recipe is checked before the slow imports, so that its problems are reported at once.
    profile = None if vram is None else planned_gpu(vram)
    loaded = load_recipe(recipe, overrides)
    with fast_import():
        from qlora_cli.jobs import plan as job
        from qlora_cli.ui import planned

    with job_observer():
        result = job.run(loaded, device_profile=profile, fit=fit, compare=compare)
    emit(result, as_json, planned.plan)
    if result.fits is False:
        ctx.exit(DoesNotFit.exit_code)


def planned_gpu(vram: str) -> DeviceProfile:
    """Return the profile of a GPU that is not present.

    vram: its memory, such as `24GiB`. The other properties are those of an RTX 4090, a common
    consumer GPU. Raises BadParameter if `vram` is not a size.
    """
    from qlora_cli.device import DeviceProfile
    from qlora_cli.units import parse_bytes

    try:
        capacity = parse_bytes(vram)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--vram") from error
    if capacity < _MIN_CAPACITY_BYTES:
        raise click.BadParameter(
            f"{vram} is less memory than any GPU has; write it with its unit, 24GiB",
            param_hint="--vram",
        )
    return DeviceProfile(
        kind="cuda",
        name="a planned GPU",
        capacity_bytes=capacity,
        capability=(8, 9),
        multiprocessors=128,
        context_bytes=_CONTEXT_BYTES,
        is_planned=True,
    )
