"""`qlora verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option, suggest
from qlora_cli.errors import VerificationFailed

if TYPE_CHECKING:
    from qlora_cli.export.serve.rounding import Bits
    from qlora_cli.jobs.gguf_results import GgufResult
    from qlora_cli.jobs.results import VerifyResult
    from qlora_cli.jobs.server_results import ServerResult


_BITS: dict[str, Bits] = {"8": 8, "4": 4}


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Folder of the run that was merged. Required, except with --gguf and --data.",
)
@click.option(
    "--server",
    metavar="URL",
    help="Check the answers of this OpenAI-compatible server instead of the files in MERGED.",
)
@click.option("--name", help="Name of the model on the server.  [default: the only one]")
@click.option(
    "--bits",
    type=click.Choice(list(_BITS)),
    help="Bits per weight that the server should have at least.  [default: 4]",
)
@click.option(
    "--gguf",
    is_flag=True,
    help="Check what the GGUF files in MERGED compute in llama.cpp instead; needs the extra "
    "`llama`.",
)
@click.option(
    "--data",
    metavar="FILE",
    help="Rows for --gguf, in any data format, in place of the run's held-out rows.",
)
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    merged: Path,
    against: Path | None,
    server: str | None,
    name: str | None,
    bits: str | None,
    gguf: bool,
    data: str | None,
    as_json: bool,
) -> None:
    """Check that a merged model matches the trained model.

    MERGED is a folder that `qlora merge` wrote. Computes every tensor again and compares it, then
    compares the logits of both models on held-out rows. Exits with code 4 if a check fails.

    With --server, sends held-out rows to a server as texts and as chats, and compares its greedy
    answers with those of MERGED. Reports whether template, special tokens, weights or quantization
    explain a difference. A quantization to fewer bits than --bits fails.

    With --gguf, compares each GGUF file with MERGED: tokens, logits, greedy answers, KL divergence.
    """
    _check_options(against, server, name, bits, gguf, data)
    with fast_import():
        from qlora_cli.jobs import verify as job
        from qlora_cli.jobs import verify_gguf as gguf_job
        from qlora_cli.jobs import verify_server as server_job
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result: VerifyResult | ServerResult | GgufResult
        if gguf:
            result = gguf_job.run(merged, against=against, data=data, observer=observer)
        elif server is None:
            assert against is not None
            result = job.run(merged, against=against, observer=observer)
        else:
            assert against is not None
            result = server_job.run(
                merged,
                against=against,
                url=server,
                name=name,
                bits=_BITS[bits or "4"],
                observer=observer,
            )
    emit(result, as_json, tables.verification)
    if not result.passed:
        ctx.exit(VerificationFailed.exit_code)
    suggest("generate", merged, "--prompt", "...")


def _check_options(
    against: Path | None,
    server: str | None,
    name: str | None,
    bits: str | None,
    gguf: bool,
    data: str | None,
) -> None:
    """Raise UsageError for options that do not belong together, or are missing."""
    if gguf and server is not None:
        raise click.UsageError("--gguf and --server are two verifications; name one of them")
    for option, value, meaning in (
        ("--name", name, "the model's name on a server"),
        ("--bits", bits, "what a server should have"),
    ):
        if value is not None and server is None:
            raise click.UsageError(f"{option} is {meaning}; add --server")
    if data is not None and not gguf:
        raise click.UsageError("--data is for --gguf; other verifications use the run's own rows")
    if data is not None and against is not None:
        raise click.UsageError("--data and --against both name the rows; name one of them")
    if against is None and data is None:
        other = ", or rows with --data FILE" if gguf else ""
        raise click.UsageError(f"name the run that was merged with --against RUN{other}")
