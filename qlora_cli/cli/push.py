"""`qlora push`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option


@click.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN_OR_MERGED")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--dry-run", is_flag=True, help="Write the files into a folder and upload nothing.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the dry run; it must be empty or must not exist.  [default: NAME-upload]",
)
@click.option(
    "--unverified",
    is_flag=True,
    help="Also upload a merged model that `qlora verify` has not passed.",
)
@json_option
def push(
    target: Path,
    repo: str,
    private: bool,
    dry_run: bool,
    out: Path | None,
    unverified: bool,
    as_json: bool,
) -> None:
    """Upload a model to the Hugging Face Hub with a model card.

    RUN_OR_MERGED is a run's folder, whose adapter is uploaded, or a folder that `qlora merge` wrote
    and `qlora verify` has passed. REPO is owner/name. The model card lists base, data, recipe,
    versions, losses, memory and the result of the verification.
    """
    if out is not None and not dry_run:
        raise click.UsageError("--out is the folder of a dry run; add --dry-run")
    with fast_import():
        from qlora_cli.jobs import push as job
        from qlora_cli.ui import tables

    preview = (out or Path(f"{repo.split('/')[-1]}-upload")) if dry_run else None
    with job_observer() as observer:
        result = job.run(
            target,
            repo,
            private=private,
            preview=preview,
            unverified=unverified,
            observer=observer,
        )
    emit(result, as_json, tables.push)
