"""`qlora verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option, suggest
from qlora_cli.errors import VerificationFailed

if TYPE_CHECKING:
    from qlora_cli.jobs.gguf_results import GgufResult
    from qlora_cli.jobs.results import ServerResult, VerifyResult


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run that was merged.",
)
@click.option(
    "--server",
    metavar="URL",
    help="Check the answers of this OpenAI-compatible server instead of the files in MERGED.",
)
@click.option(
    "--gguf",
    is_flag=True,
    help="Check what the GGUF files in MERGED compute in llama.cpp instead; needs the extra "
    "`llama`.",
)
@click.option("--name", help="Name of the model on the server.  [default: the only one]")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    merged: Path,
    against: Path,
    server: str | None,
    gguf: bool,
    name: str | None,
    as_json: bool,
) -> None:
    """Check that a merged model matches the trained model.

    MERGED is a folder that `qlora merge` wrote. Computes every tensor again and compares it, then
    compares the logits of both models on held-out rows. Exits with code 4 if a check fails.

    With --server, sends held-out prompts to a server as text and as chats, and compares its greedy
    answers with those of MERGED. Reports whether template, special tokens, weights or quantization
    explain a difference.

    With --gguf, compares each GGUF file with MERGED: tokens, logits, greedy answers, KL divergence.
    """
    _check_options(server, gguf, name)
    with fast_import():
        from qlora_cli.jobs import verify as job
        from qlora_cli.jobs import verify_gguf as gguf_job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result: VerifyResult | ServerResult | GgufResult
        if gguf:
            result = gguf_job.run(merged, against=against, observer=observer)
        elif server is None:
            result = job.run(merged, against=against, observer=observer)
        else:
            result = job.run_server(
                merged, against=against, url=server, name=name, observer=observer
            )
    emit(result, as_json, tables.verification)
    if not result.passed:
        ctx.exit(VerificationFailed.exit_code)
    suggest("generate", merged, "--prompt", "...")


def _check_options(server: str | None, gguf: bool, name: str | None) -> None:
    """Raise UsageError for options that do not belong together."""
    if gguf and server is not None:
        raise click.UsageError("--gguf and --server are two verifications; name one of them")
    if name is not None and server is None:
        raise click.UsageError("--name is the model's name on a server; add --server")
