"""`qlora generate` for a sequence classifier: the label of a text, with probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.contents import LabelledText
from qlora_cli.data.encode_labels import encoded_texts
from qlora_cli.data.load import ModelLimits
from qlora_cli.data.rows import read_rows
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import DataError, ModelError, Problem, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.generate import OnAnswerText, Prompt, has_rows, read_lines
from qlora_cli.jobs.label_results import LabelResult
from qlora_cli.jobs.labels import text_columns
from qlora_cli.memory.device import inspect_device
from qlora_cli.proof.prove import require_proof_of_model
from qlora_cli.runs.open import OpenedModel, open_any
from qlora_cli.tasks.classification import ClassificationTask, task_of_model
from qlora_cli.tasks.registry import task_of

_NAME = "label"
"""Name of the only answer to a prompt."""


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier with its tokenizer. It answers prompts as a `Prompter` does.

    formats: the names of its answers, of which there is one.
    """

    opened: OpenedModel
    task: ClassificationTask
    tokenizer: Any
    device: torch.device
    formats: tuple[str, ...] = (_NAME,)

    @torch.no_grad()
    def answer(self, prompt: Prompt, on_text: OnAnswerText | None = None) -> LabelResult:
        """Return the prediction for a prompt.

        on_text: receives the label or the number. Raises UsageError if the text is too long, or if
        it needs a second text.
        """
        settings = self.task.settings
        if settings.pairs is True and prompt.second is None:
            raise UsageError(
                "the model was trained on pairs of texts", hint="add the second text with --pair"
            )
        if settings.pairs is False and prompt.second is not None:
            raise UsageError("the model was trained on single texts", where="--pair")
        text = LabelledText(prompt.text, prompt.second, None)
        (example,) = encoded_texts([text], ["prompt"], self.tokenizer)
        limit = ModelLimits.of(self.opened.loaded.config).positions
        if limit is not None and len(example.ids) > limit:
            raise UsageError(f"the text has {len(example.ids)} tokens; the model reads {limit}")
        batch = self.task.collate([example])
        logits = self.task.logits(self.opened.loaded, batch, self.device)[0].double().cpu()
        result = self._result(prompt, logits)
        if on_text is not None:
            on_text(_NAME, result.text)
        return result

    def _result(self, prompt: Prompt, logits: torch.Tensor) -> LabelResult:
        names = self.task.settings.names
        if not names:
            value = float(logits[0])
            return LabelResult(prompt.text, f"{value:.6g}", prompt.second, value=value)
        values = torch.softmax(logits, dim=0).tolist()
        pairs = sorted(zip(names, values, strict=True), key=lambda pair: -pair[1])
        return LabelResult(prompt.text, pairs[0][0], prompt.second, dict(pairs))


def open_classifier(where: str, observer: Observer) -> Classifier:
    """Load a classifier. where: a run's folder, a model's folder or a hub id.

    Raises InputError if the model cannot be used or has no tokenizer.
    """
    require_proof_of_model(where, observer)
    device = torch.device(inspect_device().kind)
    opened = open_any(where, device, observer)
    tokenizer = load_tokenizer(str(opened.folder))
    if tokenizer is None:
        raise ModelError("the model has no tokenizer", where=str(opened.folder))
    if opened.run is not None:
        task = task_of(opened.run.recipe)
    else:
        found = task_of_model(read_config(opened.folder / "config.json"))
        assert found is not None
        task = found
    assert isinstance(task, ClassificationTask)
    return Classifier(opened, task, tokenizer, device)


def read_texts(file: Path) -> list[Prompt]:
    """Return the texts of a file: one per line, or rows with `text` and perhaps `text_pair`.

    Raises InputError if the file cannot be read, DataError listing every row without a text.
    """
    if not has_rows(file):
        return [Prompt(line) for line in read_lines(file)]
    rows = read_rows(str(file))
    columns = text_columns(rows[0]) or {}
    prompts, problems = [], []
    for row in rows:
        text = row.fields.get(columns.get("text", "text"), row.fields.get("prompt"))
        second = row.fields.get(columns.get("text_pair", "text_pair"))
        if isinstance(text, str) and isinstance(second, str | None):
            prompts.append(Prompt(text, second=second))
        else:
            problems.append(Problem(row.origin, "it has no text"))
    if problems:
        raise DataError("rows without a text", problems, hint='write {"text": "..."} in each line')
    return prompts
