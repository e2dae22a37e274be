"""`qlora eval --generate`: the model's answers next to the references of held-out rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.errors import DataError, Interrupted, Problem, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.atomic import report_write_errors
from qlora_cli.jobs.text_generator import Sampling, TextGenerator
from qlora_cli.memory.device import inspect_device
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.inference import prepare_generation
from qlora_cli.models.switch import AdapterSwitch
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.runs.open import OpenedModel


@dataclass(frozen=True)
class AnswersFile:
    """A new file of JSON lines with `origin`, `prompt`, `reference` and `answer` of each row.

    path: it must not exist. max_new_tokens: maximum length of an answer. beams: answers that beam
    search keeps; 1 is greedy decoding.
    """

    path: Path
    max_new_tokens: int
    beams: int = 1

    def write(
        self, examples: Sequence[Example], opened: OpenedModel, tokenizer: Any, observer: Observer
    ) -> None:
        """Answer the prompt of each example; a line is written as soon as it is complete.

        The last trained part of a row is the reference, and all tokens before it are the prompt. Of
        a pair it is the chosen answer.
        Raises DataError if rows have no prompt, UsageError if there is no tokenizer or the file
        exists, Interrupted at Ctrl-C.
        """
        if tokenizer is None:
            raise UsageError("the model has no tokenizer", where="--generate")
        if self.path.exists():
            raise UsageError(f"{self.path} exists", where="--generate", hint="name a new file")
        starts = _reference_starts(examples)
        device = torch.device(inspect_device().kind)
        switch = AdapterSwitch(opened.loaded, open_source(opened.weights, opened.loaded.family))
        prepare_generation(opened.loaded, device, observer)
        generator = TextGenerator(opened, switch, tokenizer, device)
        observer.stage("generate", len(examples))
        with (
            report_write_errors("the answers", self.path),
            self.path.open("x", encoding="utf-8") as stream,
        ):
            sampling = Sampling(self.max_new_tokens, beams=self.beams)
            lines = _lines(generator, examples, starts, sampling)
            try:
                for number, line in enumerate(lines, 1):
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                    stream.flush()
                    observer.advance(number)
            except KeyboardInterrupt as error:
                raise Interrupted(
                    "stopped; the complete answers are in the file", where=str(self.path)
                ) from error
        observer.note(f"answers: {self.path}")


def _lines(
    generator: TextGenerator, examples: Sequence[Example], starts: Sequence[int], sampling: Sampling
) -> Iterator[dict[str, str]]:
    tokenizer = generator.tokenizer
    for row, start in zip(examples, starts, strict=True):
        example = row.split()[0]
        prompt, reference = example.ids[:start], example.ids[start:]
        # A chat's turn ends with the token that the template writes, which the model has learned.
        end = [label for label in example.labels if label != IGNORE_INDEX][-1:]
        special = [token for token in end if token in tokenizer.all_special_ids]
        yield {
            "origin": example.origin,
            "prompt": tokenizer.decode(prompt),
            "reference": tokenizer.decode(reference, skip_special_tokens=True).strip(),
            "answer": generator.continue_from(prompt, sampling, end=special).strip(),
        }


def _reference_starts(examples: Sequence[Example]) -> list[int]:
    """Return for each example the index of the first token of its last trained part.

    Raises DataError listing the rows whose trained part begins with their first tokens.
    """
    starts, problems = [], []
    for row in examples:
        example = row.split()[0]
        trained = [label != IGNORE_INDEX for label in example.labels]
        last = len(trained) - 1 - trained[::-1].index(True)
        before = [index for index in range(last) if not trained[index]]
        if before and before[-1] > 0:
            starts.append(before[-1] + 1)
        else:
            problems.append(Problem(example.origin, "all of it is trained; it has no prompt"))
    if problems:
        raise DataError(
            "--generate needs rows with a prompt",
            problems,
            hint="use prompt and completion rows, alpaca rows or chats",
        )
    return starts
