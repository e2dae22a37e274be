"""`qlora generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from click.core import ParameterSource

from qlora_cli.cli.adapters import adapter_option, merged_option
from qlora_cli.cli.arguments import run_or_model_argument
from qlora_cli.cli.output import (
    echo,
    emit_json,
    escape_controls,
    fast_import,
    job_observer,
    json_option,
)
from qlora_cli.cli.sampling import sampling_options, system_option
from qlora_cli.cli.step import at_step, step_option
from qlora_cli.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from qlora_cli.events import Observer
    from qlora_cli.jobs.classify import Classifier
    from qlora_cli.jobs.generate import Prompt, Prompter
    from qlora_cli.jobs.label_results import LabelResult
    from qlora_cli.jobs.results import GenerateResult

_OF_TEXT = (
    *("raw", "system", "adapters", "uses", "merged"),
    *("max_new_tokens", "temperature", "top_p", "stop", "seed"),
)
"""Parameters that only apply to a model that generates text."""
_OPTION_NAMES = {"adapters": "adapter", "uses": "use"}
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@run_or_model_argument
@click.option("--prompt", metavar="TEXT", help="The prompt.")
@click.option(
    "--prompts",
    type=_FILE,
    help="File of prompts: one per line, or .jsonl rows with `prompt` or `messages`, or with "
    "`text` for a classifier. Writes one JSON object per line.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="New file for the answers to --prompts.  [default: stdout]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep the answers that are already in --out and answer the prompts after them.",
)
@click.option(
    "--pair",
    metavar="TEXT",
    help="The second text of a pair, for --prompt of a classifier.",
)
@click.option("--raw", is_flag=True, help="Send the prompt as it is.")
@system_option
@sampling_options(max_new_tokens=128, seed=0)
@step_option
@adapter_option
@click.option(
    "--use",
    "uses",
    multiple=True,
    metavar="NAME",
    help="Generate with this adapter: a NAME from --adapter, `run` for the run's own adapter, "
    "`base` for none. May be repeated.  [default: each adapter in turn]",
)
@merged_option
@json_option
def generate(
    run_or_model: str,
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    resume: bool,
    pair: str | None,
    step: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer prompts with a run or a model.

    RUN_OR_MODEL is a run's folder, a model folder, a Hub id or `starter`.

    A prompt is formatted as the rows of the run's training were: with the chat template, as an
    Alpaca instruction, or not at all. A model that is not a run gets its chat template, if it has
    one. A classifier gives the label of the prompt, with the probability of each label.
    """
    _check(prompt, pair, prompts, out, resume, as_json)
    with fast_import():
        from qlora_cli.jobs import classify
        from qlora_cli.jobs import generate as job
        from qlora_cli.jobs.open_generator import is_classifier as classifies

    where = str(at_step(run_or_model, step))
    is_classifier = classifies(where)
    _check_kind(is_classifier, pair)
    asked = job.Prompt(prompt or "", second=pair)
    with job_observer() as observer:
        read = classify.read_texts if is_classifier else job.read_prompts
        listed = read(prompts) if prompts is not None else []
        num_done = job.count_answers(out, listed) if out is not None and resume else 0
        prompter = _opened(where, is_classifier, observer, options)
    if prompts is not None:
        _write_answers(prompter, listed, out, num_done)
    elif as_json:
        emit_json(prompter.answer(asked).to_dict())
    elif isinstance(prompter, classify.Classifier):
        _show_label(prompter.answer(asked))
    else:
        _stream(prompter, asked)


def _opened(
    where: str, is_classifier: bool, observer: Observer, options: dict[str, Any]
) -> Prompter | Classifier:
    from qlora_cli.jobs import classify

    if is_classifier:
        return classify.open_classifier(where, observer)
    return _open(where, observer, **options)


def _check_kind(is_classifier: bool, pair: str | None) -> None:
    """Raise UsageError for an option that does not apply to a classifier, or only to one."""
    context = click.get_current_context()
    if not is_classifier:
        if pair is not None:
            raise UsageError("it needs a classifier", where="--pair")
        return
    for name in _OF_TEXT:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = _OPTION_NAMES.get(name, name.replace("_", "-"))
            raise UsageError("it does not apply to a classifier", where=f"--{option}")


def _show_label(result: LabelResult) -> None:
    """Print the predicted label or number, and below it each label with its probability."""
    echo(result.text)
    for name, probability in result.probabilities.items():
        echo(f"  {probability:7.2%}  {name}")


def _open(
    run_or_model: str,
    observer: Observer,
    *,
    raw: bool,
    system: str | None,
    adapters: dict[str, Path],
    uses: tuple[str, ...],
    merged: bool,
    **sampling: Any,
) -> Prompter:
    from qlora_cli.jobs import generate as job
    from qlora_cli.jobs.text_generator import Sampling

    return job.open_prompter(
        run_or_model,
        Sampling(**sampling),
        observer,
        raw=raw,
        system=system,
        adapters=adapters,
        uses=uses,
        merged=merged,
    )


def _check(
    prompt: str | None,
    pair: str | None,
    prompts: Path | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Raise UsageError if the options do not go together."""
    if (prompt is None) == (prompts is None):
        raise UsageError("name one of --prompt and --prompts")
    if prompts is None and out is not None:
        raise UsageError("it needs --prompts", where="--out")
    if prompt is None and pair is not None:
        raise UsageError("it needs --prompt", where="--pair")
    if prompts is not None and as_json:
        raise UsageError("--prompts writes JSON lines already", hint="omit --json")
    if out is None and resume:
        raise UsageError("it needs --out", where="--resume")
    if out is not None and out.exists() and not resume:
        raise UsageError(
            f"{out} exists",
            where="--out",
            hint="name a new file, or add --resume to answer the prompts that it lacks",
        )


def _stream(prompter: Prompter, prompt: Prompt) -> None:
    """Print the answers while they are generated; several ones get a line with their name."""
    current = ""

    def show(name: str, piece: str) -> None:
        nonlocal current
        if name != current and len(prompter.formats) > 1:
            echo(f"{chr(10) * 2 if current else ''}{name}:")
        current = name
        echo(piece, end="")

    try:
        result = prompter.answer(prompt, show)
        _warn_empty(result)
    finally:
        click.echo()


def _warn_empty(result: GenerateResult) -> None:
    """Report answers without text: an empty line alone would look like a failure."""
    for name, text in result.answers.items():
        if not text.strip():
            echo(f"{name}: the answer is empty; the first token ended it", err=True)


def _write_answers(
    prompter: Prompter | Classifier, prompts: list[Prompt], out: Path | None, num_done: int
) -> None:
    """Write one JSON object per prompt, each as soon as it is complete.

    num_done: number of the first prompts whose answers are in `out` already.
    """
    from qlora_cli.files.atomic import report_write_errors

    if out is None:
        _write_lines(prompter, prompts, sys.stdout, encode=escape_controls)
        return
    with report_write_errors("the answers", out), out.open("a", encoding="utf-8") as stream:
        try:
            _write_lines(prompter, prompts, stream, num_done)
        except KeyboardInterrupt as error:
            raise Interrupted(
                "stopped; the complete answers are in the file",
                where=str(out),
                hint="add --resume to the same command to answer the other prompts",
            ) from error


def _write_lines(
    prompter: Prompter | Classifier,
    prompts: list[Prompt],
    stream: TextIO,
    num_done: int = 0,
    encode: Callable[[str], str] = str,
) -> None:
    with job_observer() as observer:
        observer.stage("generate", len(prompts))
        observer.advance(num_done)
        for number, prompt in enumerate(prompts[num_done:], num_done + 1):
            content = {**prompter.answer(prompt).to_dict(), "prompt": prompt.content}
            line = json.dumps(content, ensure_ascii=False)
            stream.write(encode(line) + "\n")
            stream.flush()
            observer.advance(number)
