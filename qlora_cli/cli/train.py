"""`qlora train`."""

from __future__ import annotations

import click

from qlora_cli.cli.arguments import allow_option, recipe_argument
from qlora_cli.cli.output import (
    emit,
    expect_no_json,
    fast_import,
    job_observer,
    json_option,
    overrides_argument,
    recipe_of,
    suggest,
    write_page,
)
from qlora_cli.errors import Interrupted, MicroBatchTooLarge, NotFinite


@click.command()
@recipe_argument
@overrides_argument
@click.option("--resume", is_flag=True, help="Continue the run from its last checkpoint.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    help="Train in N processes on this machine, one per GPU, with the result of one.",
)
@allow_option
@json_option
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    resume: bool,
    processes: int,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run the fine-tuning job of a recipe.

    RECIPE is a YAML file or the name of a shipped recipe (`qlora recipe list`); a key=value, such
    as train.lr=1e-4, replaces one of its settings. The adapter, checkpoints and the report are
    written to the folder that the setting `output` names.

    The rows are checked first, as by `qlora data`: warnings are shown, an error stops the job with
    exit code 2 before anything is written.

    Ctrl-C finishes the current step, writes a checkpoint and exits with code 130; --resume
    continues from there. A stopped run can be merged and tried, too. With more train.epochs or
    train.steps, --resume extends a finished run.

    With --processes, or started by `accelerate launch -m qlora_cli train RECIPE`, several processes
    share the train.grad_accum micro-batches of each step. Each has the complete base on its GPU, or
    a part of it with base.residency: shard.
    """
    from qlora_cli.recipe.shipped import find_recipe

    # The recipe is checked before the slow imports, so that its problems are reported at once.
    path = find_recipe(recipe)
    loaded = recipe_of(path, overrides)
    if processes > 1:
        from qlora_cli.train.launcher import check_no_launcher, launch

        check_no_launcher()
        options = [*(["--resume"] if resume else []), *(["--json"] if as_json else [])]
        options += [word for code in allow for word in ("--allow", code)]
        expect_no_json()  # The main process prints it.
        ctx.exit(launch(["train", *options, recipe, *overrides], processes))
    with fast_import():
        from qlora_cli.jobs import follow
        from qlora_cli.jobs import train as job
        from qlora_cli.parallel.processes import leave
        from qlora_cli.train.launcher import end_with_launcher
        from qlora_cli.train.runtime import join_processes
        from qlora_cli.ui import tables

    end_with_launcher()
    joined = join_processes()
    if not joined.is_main:
        expect_no_json()
        try:
            follow.run(joined)
        except (Interrupted, NotFinite, MicroBatchTooLarge) as error:
            ctx.exit(error.exit_code)  # All processes raise it, and the main one reports it.
        leave()
        return
    with job_observer() as observer:
        result = job.run(
            loaded,
            recipe_path=path,
            resume=resume,
            observer=observer,
            allow=allow,
            processes=joined,
        )
        write_page(result.run, observer)
    leave()
    emit(result, as_json, tables.train)
    suggest("generate", result.run, "--prompt", "...")
