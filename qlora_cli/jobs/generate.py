"""`qlora generate`: answer prompts with a run or a model and each of its adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.data.rows import read_rows
from qlora_cli.errors import DataError, InputError, Problem, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.atomic import PARSE_ERRORS, report_write_errors
from qlora_cli.jobs.open_generator import NO_ADAPTERS, open_generator
from qlora_cli.jobs.prompt_format import PromptFormat, prompt_format
from qlora_cli.jobs.results import GenerateResult
from qlora_cli.jobs.text_generator import Sampling, TextGenerator
from qlora_cli.models.switch import BASE

OnAnswerText = Callable[[str, str], None]
"""Receives the name of an adapter and the next piece of its answer."""
_ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file. messages: a chat that ends with a user message, or None for `text`.

    second: the second text of a pair, for a classifier.
    """

    text: str
    messages: list[dict[str, Any]] | None = None
    second: str | None = None

    @property
    def content(self) -> Any:
        """Return what the file has: the messages of a chat, else the text."""
        return self.text if self.messages is None else self.messages


@dataclass(frozen=True)
class Prompter:
    """A loaded model that answers prompts with each of its adapters.

    formats: adapter -> how its prompts are formatted, in the order of generation.
    """

    generator: TextGenerator
    formats: Mapping[str, PromptFormat]
    sampling: Sampling

    def answer(self, prompt: Prompt, on_text: OnAnswerText | None = None) -> GenerateResult:
        """Return the answer of each adapter.

        on_text: receives the answers in pieces while they are generated. Raises UsageError if the
        prompt is empty, too long or cannot be formatted.
        """
        ids = {name: _ids(prompt, chosen) for name, chosen in self.formats.items()}
        answers = {}
        for name, chosen in self.formats.items():
            self.generator.switch.use(name)
            piece = None if on_text is None else _named(on_text, name)
            answers[name] = self.generator.continue_from(
                ids[name], self.sampling, piece, chosen.end_ids()
            )
        first = next(iter(self.formats))
        return GenerateResult(prompt.text, answers[first], answers, self.formats[first].name)


def _ids(prompt: Prompt, chosen: PromptFormat) -> list[int]:
    if prompt.messages is None:
        return chosen.ids(prompt.text)
    return chosen.chat_ids(prompt.messages)


def open_prompter(
    run_or_model: str,
    sampling: Sampling,
    observer: Observer,
    *,
    raw: bool = False,
    system: str | None = None,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    uses: Sequence[str] = (),
    merged: bool = False,
) -> Prompter:
    """Load a model to answer prompts with. The format of the prompts is reported as a note.

    Prompts of several adapters are formatted for each as in its own training.

    run_or_model, adapters, merged: as of `open_generator`.
    raw, system: as of `prompt_format`.
    uses: names of the adapters to generate with, in this order; empty for all.

    Raises InputError if the model, an adapter, a name or the tokenizer does not exist.
    """
    generator = open_generator(run_or_model, observer, adapters, uses=uses, merged=merged)
    formats = {
        name: prompt_format(generator.prompt_source(name), raw=raw, system=system)
        for name in uses or generator.switch.adapters or (BASE,)
    }
    if not raw:
        _note_formats(formats, observer)
    return Prompter(generator, formats, sampling)


def _note_formats(formats: Mapping[str, PromptFormat], observer: Observer) -> None:
    """Report the reason of the formats, or of each one if they are for different reasons."""
    reasons = {chosen.reason for chosen in formats.values()}
    if len(reasons) == 1:
        observer.note(reasons.pop())
        return
    for name, chosen in formats.items():
        observer.note(f"{name}: {chosen.reason}")


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a file.

    file: rows with a `prompt` or with `messages` (.jsonl, .json, .csv, .parquet), or any other
    text file with one prompt per line; empty lines are skipped. A last message of the assistant
    is removed. Raises InputError if the file cannot be read, DataError listing every row without
    a prompt.
    """
    if not has_rows(file):
        return [Prompt(line) for line in read_lines(file)]
    prompts, problems = [], []
    for row in read_rows(str(file)):
        messages, text = row.fields.get("messages"), row.fields.get("prompt")
        if isinstance(text, str) and text:
            prompts.append(Prompt(text))
        elif isinstance(messages, list) and messages and _are_messages(messages):
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            prompts.append(Prompt(json.dumps(asked, ensure_ascii=False), asked))
        else:
            problems.append(Problem(row.origin, "it has no prompt and no messages"))
    if problems:
        raise DataError(
            "rows without a prompt",
            problems,
            hint='write each line as {"prompt": "..."} or {"messages": [...]}',
        )
    return prompts


def count_answers(file: Path, prompts: Sequence[Prompt]) -> int:
    """Return the number of prompts that are answered in a file that `qlora generate` wrote.

    file: it may be absent. An incomplete last line, of a process that was killed, is removed.
    Raises UsageError if a line is not the answer to the prompt with its number.
    """
    if not file.exists():
        return 0
    with report_write_errors("the answers", file):
        *lines, rest = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines):
            if number >= len(prompts) or not _is_answer(line, prompts[number]):
                raise _other_answers(file, number)
        if rest:
            if len(lines) >= len(prompts) or not _is_start(rest, prompts[len(lines)]):
                raise _other_answers(file, len(lines))
            with file.open("r+b") as stream:
                stream.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)


def _is_answer(line: bytes, prompt: Prompt) -> bool:
    try:
        return bool(json.loads(line)["prompt"] == prompt.content)
    except PARSE_ERRORS:
        return False


def _is_start(line: bytes, prompt: Prompt) -> bool:
    """Return whether an incomplete line is the start of an answer to the prompt."""
    start = json.dumps({"prompt": prompt.content}, ensure_ascii=False)[:-1].encode()
    return line.startswith(start) or start.startswith(line)


def _other_answers(file: Path, number: int) -> UsageError:
    return UsageError(
        f"it is not the answer to prompt {number + 1} of --prompts",
        where=f"{file}:{number + 1}",
        hint="--resume continues a file that the same command has begun; else name a new file",
    )


def has_rows(file: Path) -> bool:
    """Return whether a file of prompts has rows with fields, by its name."""
    return file.suffix in _ROW_SUFFIXES


def read_lines(file: Path) -> list[str]:
    """Return the lines of a file that are not empty. Raises InputError if there are none."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from error
    if not lines:
        raise UsageError("it contains no prompt", where=str(file))
    return lines


def _are_messages(messages: list[Any]) -> bool:
    return all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages
    )


def _named(on_text: OnAnswerText, name: str) -> Callable[[str], None]:
    return lambda piece: on_text(name, piece)
