"""`qlora plan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from qlora_cli.cli.arguments import recipe_argument
from qlora_cli.cli.output import (
    echo,
    emit,
    fast_import,
    job_observer,
    json_option,
    overrides_argument,
    recipe_of,
)
from qlora_cli.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from qlora_cli.device import DeviceProfile


@click.command()
@recipe_argument
@overrides_argument
@click.option(
    "--vram",
    metavar="SIZE|NAME",
    help="Plan for a GPU with this much memory, such as 24GiB or 24, or for a GPU by its name, "
    'such as "RTX 4090", instead of for this machine.',
)
@click.option(
    "--devices",
    metavar="NxSIZE|NAME",
    help="Plan each process of a job on several such GPUs, such as 2x24GiB or '2xRTX 4090'.",
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
@click.option(
    "--details",
    is_flag=True,
    help="Also show the memory by phase and category, full fine-tuning and how figures were found.",
)
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    vram: str | None,
    devices: str | None,
    fit: bool,
    compare: bool,
    details: bool,
    as_json: bool,
) -> None:
    """Compute the memory that a job needs, before it runs.

    Performs a dry run of the job: the same code on tensors without data. Shows whether it fits and
    what it needs on disk. Reads only the config of the base model and needs no GPU; with base.bits:
    auto it measures the base first.

    RECIPE is a YAML file or the name of a shipped recipe (`qlora recipe list`); a key=value, such
    as data.seq_len=512, replaces one of its settings. Exits with code 3 if the job does not fit,
    and with code 2 if a data file is missing.
    """
    # The recipe is checked before the slow imports, so that its problems are reported at once.
    profile = planned_profile(vram, devices)
    loaded = recipe_of(recipe, overrides)
    with fast_import():
        from qlora_cli.jobs import plan as job
        from qlora_cli.ui import planned

    with job_observer() as observer:
        result = job.run(
            loaded, device_profile=profile, fit=fit, compare=compare, observer=observer
        )
    emit(result, as_json, partial(planned.plan, details=details))
    if result.fits is False:
        ctx.exit(DoesNotFit.exit_code)
    if result.data_problem and not _names_example_data(recipe, overrides):
        echo(f"error: {result.data_problem}", err=True)
        ctx.exit(InputError.exit_code)


def _names_example_data(recipe: str, overrides: tuple[str, ...]) -> bool:
    """Return whether the data files are those of a shipped recipe, which are not there yet."""
    from qlora_cli.recipe.shipped import shipped_recipes

    is_named = any(text.startswith(("data.train=", "data.eval=")) for text in overrides)
    return recipe in shipped_recipes() and not is_named


def planned_gpu(vram: str) -> DeviceProfile:
    """Return the profile of a GPU that is not present, by its memory or name.

    Raises BadParameter if `vram` is neither.
    """
    from qlora_cli.recipe import gpus

    return _profile(gpus.planned_gpu, vram, "--vram")


def planned_profile(vram: str | None, devices: str | None) -> DeviceProfile | None:
    """Return the profile of the GPU that an option names; None for the device of this machine.

    Raises UsageError if both options are given, BadParameter if one is not understood.
    """
    from qlora_cli.recipe import gpus

    if devices is None:
        return None if vram is None else planned_gpu(vram)
    if vram is not None:
        raise click.UsageError("--vram and --devices name two different GPUs; leave one out")
    return _profile(gpus.planned_devices, devices, "--devices")


def _profile(find: Callable[[str], DeviceProfile], text: str, option: str) -> DeviceProfile:
    try:
        return find(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from error
