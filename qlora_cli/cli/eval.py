"""`qlora eval`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option
from qlora_cli.cli.step import at_step, step_option
from qlora_cli.errors import UsageError

_ANSWER_TOKENS = 256


@click.command(name="eval")
@click.argument("run_or_model")
@click.option(
    "--data",
    required=True,
    help="Held-out rows: a file or a Hub dataset, in any format that `data.train` accepts.",
)
@click.option(
    "--generate",
    "answers",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also answer the prompt of each row and write the answers next to the references to this "
    "new file, as JSON lines.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum number of tokens of an answer; for --generate.  [default: 256]",
)
@step_option
@json_option
def eval_(
    run_or_model: str,
    data: str,
    answers: Path | None,
    max_new_tokens: int | None,
    step: int | None,
    as_json: bool,
) -> None:
    """Compute loss, perplexity and accuracy on held-out rows.

    RUN_OR_MODEL is a run's folder, a model folder, a Hub id or `starter`.
    """
    if max_new_tokens is not None and answers is None:
        raise UsageError("it needs --generate", where="--max-new-tokens")
    with fast_import():
        from qlora_cli.jobs import evaluate as job
        from qlora_cli.jobs.eval_answers import AnswersFile
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(
            str(at_step(run_or_model, step)),
            data=data,
            observer=observer,
            answers=AnswersFile(answers, max_new_tokens or _ANSWER_TOKENS) if answers else None,
        )
    emit(result, as_json, tables.evaluation)
