"""The option `--step` of commands that use a run's weights."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.errors import UsageError
from qlora_cli.files.paths import user_path

step_option = click.option(
    "--step",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use the checkpoint of step N of the run.  [default: the exported weights of a finished "
    "run; else the checkpoint with the lowest held-out loss, or the last one]",
)


def at_step(run: str | Path, step: int | None) -> Path | str:
    """Return the path of a run's checkpoint, which is accepted wherever a run is; `run` for None.

    Raises UsageError if `run` is not a run's folder.
    """
    if step is None:
        return run
    folder = user_path(run)
    if not (folder / "run.json").is_file():
        raise UsageError(
            f"{run} is not a run's folder", where="--step", hint="only a run has checkpoints"
        )
    return folder / "checkpoints" / f"step-{step:06d}"
