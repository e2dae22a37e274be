"""`qlora init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_cli.cli.output import emit, fast_import, job_observer, json_option, suggest
from qlora_cli.cli.plan import planned_gpu
from qlora_cli.errors import UsageError

if TYPE_CHECKING:
    from qlora_cli.jobs.init_rows import HeldOut

_THIS_MACHINE = "this machine"


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("recipe.yaml"))
@click.option("--model", metavar="NAME", help="Base model: a hub id, a folder, or `starter`.")
@click.option(
    "--data",
    "train",
    metavar="PATH",
    multiple=True,
    help="Training rows: a file, a folder, a pattern or a hub dataset; can be repeated.",
)
@click.option(
    "--eval",
    "held_out",
    metavar="PATH|SHARE|none",
    default="auto",
    show_default=True,
    help="Held-out rows: a file, or a share of the training rows such as 0.1; auto chooses the "
    "share by the number of rows.",
)
@click.option(
    "--vram",
    metavar="SIZE|NAME",
    help="Choose the sizes for a GPU with this much memory, such as 24GiB, or for a GPU by its "
    'name, such as "RTX 4090"; the default is this machine.',
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
def init(
    file: Path,
    model: str | None,
    train: tuple[str, ...],
    held_out: str,
    vram: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a recipe for a model, your rows and a GPU.

    Reads the model's config, its tokenizer and the rows, plans the memory, and writes sequence
    length, batch, bits, learning rate and epochs to FILE (default: recipe.yaml), with reasons.

    In a terminal, missing options are asked for. Exits with code 3 if the model does not fit the
    GPU with any settings.
    """
    # Options are checked before the slow imports, so that problems are reported at once.
    gpu, eval_ = None if vram is None else planned_gpu(vram), _held_out(held_out)
    if model is None or not train:
        model, train, vram = _ask(model, train, vram)
        gpu = None if vram is None else planned_gpu(vram)
    with fast_import():
        from qlora_cli.jobs import init as job
        from qlora_cli.ui import initialized

    with job_observer() as observer:
        result = job.run(
            file,
            model=model,
            train=train[0] if len(train) == 1 else list(train),
            held_out=eval_,
            device_profile=gpu,
            force=force,
            observer=observer,
        )
    emit(result, as_json, initialized.init)
    suggest("data", file)
    suggest("plan", file, *([] if vram is None else ["--vram", vram]))
    suggest("train", file)


def _ask(
    model: str | None, train: tuple[str, ...], vram: str | None
) -> tuple[str, tuple[str, ...], str | None]:
    """Return model, data and GPU; those that are None are asked for.

    Raises UsageError naming the missing options if stdin is no terminal.
    """
    missing = [name for name, value in (("--model", model), ("--data", train)) if not value]
    if not sys.stdin.isatty():
        raise UsageError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, and stdin is "
            "no terminal in which they can be asked for",
            hint="qlora init mine.yaml --model NAME --data rows.jsonl --vram 24GiB",
        )
    if model is None:
        model = _prompt("Base model, a hub id or a folder", _default_model())
    if not train:
        train = (_prompt("Training rows, a file or a folder", _default_rows(), check=_check_rows),)
    if vram is None:
        question = 'GPU, its memory such as 24GiB or its name such as "RTX 4090"'
        answer = _prompt(question, _THIS_MACHINE, check=_check_gpu)
        vram = None if answer == _THIS_MACHINE else answer
    return model, train, vram


def _prompt(question: str, default: str | None, check: Any = None) -> str:
    """Return the answer to a question on stderr; it is repeated until `check` accepts it."""
    answer: str = click.prompt(question, default=default, value_proc=check, err=True)
    return answer


def _check_gpu(text: str) -> str:
    if text != _THIS_MACHINE:
        planned_gpu(text)
    return text


def _check_rows(text: str) -> str:
    from qlora_cli.data.sources import open_sources
    from qlora_cli.errors import InputError

    try:
        open_sources([text])
    except InputError as error:
        raise click.BadParameter(
            f"{error.what}{f' ({error.hint})' if error.hint else ''}"
        ) from error
    return text


def _default_model() -> str:
    """Return the base of the shipped recipe for chats."""
    from qlora_cli.recipe.load import load_recipe

    return load_recipe("chat").model.name


def _default_rows() -> str | None:
    """Return the first data file of the current folder, or None."""
    from qlora_cli.data.readers import file_type

    files = sorted(path for path in Path.cwd().iterdir() if path.is_file())
    return next((path.name for path in files if file_type(path) and path.name[0] != "."), None)


def _held_out(text: str) -> HeldOut:
    """Return the value of `data.eval` that an option names."""
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 < share < 1:
        raise click.BadParameter(
            f"{text} is no share between 0 and 1, such as 0.1", param_hint="--eval"
        )
    return share
