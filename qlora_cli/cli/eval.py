"""`qlora eval`."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_cli.cli.arguments import complete_path, run_or_model_argument
from qlora_cli.cli.output import emit, fast_import, job_observer, json_option
from qlora_cli.cli.step import at_step, step_option
from qlora_cli.errors import UsageError

_ANSWER_TOKENS = 256


@click.command(name="eval")
@run_or_model_argument
@click.option(
    "--data",
    shell_complete=complete_path,
    help="Held-out rows: a file or a Hub dataset, in any format that `data.train` accepts.",
)
@click.option(
    "--generate",
    "answers",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also answer the prompt of each row and write the answers next to the references to this "
    "new file, as JSON lines; for --data.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum number of tokens of an answer; for --generate.  [default: 256]",
)
@click.option(
    "--beams",
    type=click.IntRange(min=1),
    metavar="N",
    help="Search each answer with N beams; 1 is greedy decoding; for --generate.  [default: 1]",
)
@click.option(
    "--tasks",
    metavar="NAME,...",
    help="Tasks, groups or patterns of lm-eval, for example arc_easy,mmlu_*; needs the extra "
    "`eval`.",
)
@click.option(
    "--num-fewshot",
    type=click.IntRange(min=0),
    metavar="N",
    help="Examples before each question; for --tasks.  [default: the task's own]",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use the first N rows of each task; for --tasks.",
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder with tasks of your own in lm-eval's YAML format; for --tasks.",
)
@click.option(
    "--apply-chat-template",
    is_flag=True,
    help="Format the prompts with the chat template; for --tasks.",
)
@step_option
@json_option
def eval_(
    run_or_model: str,
    data: str | None,
    answers: Path | None,
    max_new_tokens: int | None,
    beams: int | None,
    tasks: str | None,
    num_fewshot: int | None,
    limit: int | None,
    include_path: Path | None,
    apply_chat_template: bool,
    step: int | None,
    as_json: bool,
) -> None:
    """Measure loss and accuracy on rows, or run tasks of lm-eval.

    RUN_OR_MODEL is a run's folder, a model folder, a Hub id or `starter`.
    """
    if (data is None) == (tasks is None):
        raise UsageError("name one of --data and --tasks")
    _check_pairs(
        ("--generate", answers, "--data", data),
        ("--max-new-tokens", max_new_tokens, "--generate", answers),
        ("--beams", beams, "--generate", answers),
        ("--num-fewshot", num_fewshot, "--tasks", tasks),
        ("--limit", limit, "--tasks", tasks),
        ("--include-path", include_path, "--tasks", tasks),
        ("--apply-chat-template", apply_chat_template or None, "--tasks", tasks),
    )
    where = str(at_step(run_or_model, step))
    if tasks is None:
        assert data is not None
        file = (answers, max_new_tokens or _ANSWER_TOKENS, beams or 1) if answers else None
        _evaluate_rows(where, data, file, as_json)
        return
    with fast_import():
        from qlora_cli.jobs import eval_tasks as job
        from qlora_cli.ui import task_scores

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise UsageError("it names no task", where="--tasks")
    options = job.TaskOptions(names, num_fewshot, limit, include_path, apply_chat_template)
    with job_observer() as observer:
        result = job.run(where, options, observer)
    emit(result, as_json, task_scores.render)


def _check_pairs(*pairs: tuple[str, object, str, object]) -> None:
    """Raise UsageError for an option without the one it needs: (option, value, needed, value)."""
    for option, value, needed, needed_value in pairs:
        if value is not None and needed_value is None:
            raise UsageError(f"it needs {needed}", where=option)


def _evaluate_rows(
    where: str, data: str, answers: tuple[Path, int, int] | None, as_json: bool
) -> None:
    """Run and print the evaluation on the rows of `data`. answers: fields of `AnswersFile`."""
    with fast_import():
        from qlora_cli.jobs import evaluate as job
        from qlora_cli.jobs.eval_answers import AnswersFile
        from qlora_cli.ui import tables

    with job_observer() as observer:
        result = job.run(
            where,
            data=data,
            observer=observer,
            answers=AnswersFile(*answers) if answers else None,
        )
    emit(result, as_json, tables.evaluation)
