"""Compare what a GGUF file computes in llama.cpp with the merged folder in transformers.

The comparison uses held-out rows and the folder in float32. It reports KL(merged || file), the
largest logit difference, top-1 agreement and greedy answers. Checked are:

- tokens: llama.cpp splits the rows' texts as the tokenizer does, and the file has the tokenizer's
  chat template;
- the mean KL of the most exact types of files, which must not exceed a limit (`_MAX_KL`). Wrong
  metadata, such as another rotary base, is found only by this check: the tensors are compared
  elsewhere (`quantized.py`).

The KL of smaller types is reported and not checked: it depends on the model how much they lose.
Greedy answers are not checked, because quantization can decide a tie between two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from gguf import GGUFReader, Keys, LlamaFileType
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.events import Observer
from qlora_cli.export.gguf.llama_file import LlamaFile
from qlora_cli.export.serve.local_model import LocalModel
from qlora_cli.nn.labels import IGNORE_INDEX

MAX_ROW_TOKENS = 512
"""Tokens of a row that are compared; llama.cpp keeps the logits of all of them."""
NUM_PROMPTS = 8
NUM_TOKENS = 24
"""Prompts that are answered, and tokens of an answer."""
_MAX_KL = {"F32": 0.01, "F16": 0.01, "BF16": 0.01, "Q8_0": 0.03}
"""Type of file -> largest mean KL in nats. docs/merging.md has the measured values."""


@dataclass(frozen=True)
class FilePredictions:
    """How the predictions of a GGUF file compare with the merged folder's.

    kind: the file's type, such as Q4_K_M. mean_kl: in nats per token, with the merged folder as the
    reference. answers, same_answers: number of greedy answers, and of equal ones. faults: failed
    checks.
    """

    kind: str
    mean_kl: float
    max_logit_difference: float
    top1_agreement: float
    answers: int
    same_answers: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """The merged folder in transformers, and the rows on which files are compared with it.

    rows: with labels; at most `MAX_ROW_TOKENS` tokens of each are used.
    """

    model: LocalModel
    rows: Sequence[Example]

    @cached_property
    def answers(self) -> list[tuple[list[int], list[int]]]:
        """The prompts of the first rows, with the greedy answer of each."""
        prompts = [_prompt(row) for row in self.rows[:NUM_PROMPTS]]
        return [(prompt, self.model.greedy(prompt, NUM_TOKENS)) for prompt in prompts]


def compare_file(file: Path, reference: Reference, observer: Observer) -> FilePredictions:
    """Compare one GGUF file with the merged folder.

    Raises ModelError if llama.cpp cannot load the file.
    """
    model, rows = reference.model, reference.rows
    kind, template = _kind_and_template(file)
    opened = LlamaFile(file, MAX_ROW_TOKENS + NUM_TOKENS)
    observer.stage(file.name, len(rows))
    try:
        faults = list(_token_faults(opened, template, model, rows))
        measured = [_differences(opened, model, row) for row in _counted(rows, observer)]
        is_same = [
            opened.greedy(prompt, NUM_TOKENS, model.ends) == answer
            for prompt, answer in reference.answers
        ]
    finally:
        opened.close()
    divergence, largest, top1 = (torch.cat(parts) for parts in zip(*measured, strict=True))
    mean_kl, allowed = float(divergence.mean()), _MAX_KL.get(kind, math.inf)
    # `not <=` also reports NaN.
    if not mean_kl <= allowed:
        faults.append(
            f"the mean KL from the merged model is {mean_kl:.3g} nats, and at most {allowed:g} is "
            f"allowed for {kind}"
        )
    return FilePredictions(
        kind,
        mean_kl,
        float(largest.max()),
        float(top1.mean()),
        len(is_same),
        sum(is_same),
        tuple(faults),
    )


def _counted(rows: Sequence[Example], observer: Observer) -> Iterator[Example]:
    for done, row in enumerate(rows, 1):
        yield row
        observer.advance(done)


def _kind_and_template(file: Path) -> tuple[str, str | None]:
    """Return the type of a GGUF file and its chat template."""
    reader = GGUFReader(file)
    kind, template = (
        reader.get_field(key) for key in (Keys.General.FILE_TYPE, Keys.Tokenizer.CHAT_TEMPLATE)
    )
    known = {member.value: member.name.removeprefix("MOSTLY_") for member in LlamaFileType}
    number = -1 if kind is None else int(kind.contents())
    name = known.get(number, "unknown").removeprefix("ALL_")
    return name, None if template is None else str(template.contents())


def _token_faults(
    opened: LlamaFile, template: str | None, model: LocalModel, rows: Sequence[Example]
) -> Iterator[str]:
    own = model.tokenizer.chat_template
    if own and template != own:
        yield "its chat template is not the merged model's"
    texts = [
        str(model.tokenizer.decode(row.ids[:MAX_ROW_TOKENS], skip_special_tokens=True))
        for row in rows
    ]
    num = sum(opened.tokenize(text) != model.encode(text, special=True) for text in texts)
    if num:
        yield f"llama.cpp splits {num} of {len(texts)} texts into other tokens than the tokenizer"


def _differences(
    opened: LlamaFile, model: LocalModel, row: Example
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL, largest logit difference and whether the top-1 tokens agree, at each position.

    The positions are those that predict a trained token, or all if the row's begin has none.
    """
    ids, labels = row.ids[:MAX_ROW_TOKENS], row.labels[:MAX_ROW_TOKENS]
    trained = [index - 1 for index, label in enumerate(labels) if index and label != IGNORE_INDEX]
    positions = trained or list(range(len(ids)))
    p, q = model.logits(ids)[positions], opened.logits(ids)[positions]
    own, other = p.log_softmax(-1), q.log_softmax(-1)
    divergence = (own.exp() * (own - other)).sum(-1)
    return divergence, (p - q).abs().amax(-1), (p.argmax(-1) == q.argmax(-1)).float()


def _prompt(row: Example) -> list[int]:
    """Return the tokens before the first trained one, or the first half of the row."""
    ids = row.ids[:MAX_ROW_TOKENS]
    first = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), 0)
    return ids[: first if first > 1 else max(1, len(ids) // 2)]
