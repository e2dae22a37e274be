"""`qlora data`: how the model sees the rows, before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import Any

from qlora_cli.data.checks import examine, length_notes
from qlora_cli.data.encode import Example
from qlora_cli.data.long_rows import LongRowsReport
from qlora_cli.data.packing import pack
from qlora_cli.events import Observer, Silent
from qlora_cli.files.locate import find_config, find_tokenizer, read_config
from qlora_cli.jobs.data_findings import dataset_of
from qlora_cli.jobs.data_survey import row_loader
from qlora_cli.jobs.labels import resolve_labels
from qlora_cli.jobs.results import DataResult, ShownRow
from qlora_cli.jobs.training_length import TrainingLength
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.classification import CLASSIFICATION
from qlora_cli.tasks.registry import task_of

_SILENT = Silent()
_CONTEXT = 8
"""Tokens that are decoded before a token, so that its text has its spaces."""


def run(
    recipe: Recipe, *, show: int, observer: Observer = _SILENT, allow: Collection[str] = ()
) -> DataResult:
    """Encode the recipe's rows and check them.

    show: number of rows that are returned token by token. observer: receives the progress. allow:
    codes of findings of severity `error` that training accepts. Only the base's tokenizer and
    config are loaded. Raises InputError, DataError or ModelError for the rows that cannot be
    tokenized; findings do not raise.
    """
    recipe, choices = _with_labels(recipe)
    data = recipe.data
    loader = row_loader(recipe)
    loaded = loader.load(observer)
    train, examples = loaded.train, loaded.train.examples
    lengths = examples.lengths
    tokens, trained_tokens = (
        int(column.sum(dtype="int64")) for column in (lengths, examples.targets)
    )
    num_sequences = len(pack(lengths, data.seq_len)) if data.packing else len(lengths)
    base = find_tokenizer(recipe.model.name, recipe.model.revision)
    dataset = dataset_of(data, loaded, loader.tokenizer, base)
    findings = examine(dataset)
    length = TrainingLength.of_totals(recipe, len(examples), num_sequences, tokens, trained_tokens)
    return DataResult(
        rows=len(examples),
        sequences=num_sequences,
        tokens=tokens,
        trained_tokens=trained_tokens,
        longest_row=int(lengths.max()),
        format=train.format,
        shown=tuple(
            shown
            for example in examples[:show]
            for shown in _shown_segments(example, recipe, loader.tokenizer)
        ),
        findings=findings,
        stops=any(found.severity == "error" and found.code not in allow for found in findings),
        notes=(*choices, *loaded.notes, *length_notes(dataset, num_sequences)),
        held_out_rows=0 if dataset.held_out is None else len(dataset.held_out),
        dropped=train.long_rows.dropped,
        long_rows=_long_rows(train.long_rows),
        sources=tuple(asdict(source) for source in loaded.sources),
        updates=length.updates,
        warning=length.warning(),
    )


def _long_rows(report: LongRowsReport) -> dict[str, Any]:
    """Return the report on long rows for `--json`."""
    return {
        "policies": report.policies,
        "limit": report.limit,
        "rows": report.long_rows,
        "tokens": report.long_tokens,
        "lost_tokens": report.lost_tokens,
        "pieces": report.pieces,
        "first": [origin for origin, _ in report.first],
    }


def _with_labels(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with its labels, for `task: classification`, and the choices as notes."""
    if recipe.task != CLASSIFICATION.name:
        return recipe, []
    config = read_config(find_config(recipe.model.name, recipe.model.revision))
    recipe, choices = resolve_labels(recipe, config)
    return recipe, [f"{choice.key} = {choice.value}: {choice.reason}" for choice in choices]


def _shown_segments(example: Example, recipe: Recipe, tokenizer: Any) -> Iterator[ShownRow]:
    """Yield the segments of an example; one segment if it has no others."""
    if example.value is not None:
        names = recipe.classification.names
        label = names[int(example.value)] if names else f"{example.value:g}"
        shown = _shown(example, tokenizer)
        yield replace(shown, origin=f"{shown.origin} label {label}")
        return
    for segment, name in zip_longest(example.split(), task_of(recipe).segment_names):
        shown = _shown(segment, tokenizer)
        yield replace(shown, origin=f"{shown.origin} {name}") if name else shown


def _shown(example: Example, tokenizer: Any) -> ShownRow:
    # The first token is never predicted, so it is never trained.
    trained = [i > 0 and label != IGNORE_INDEX for i, label in enumerate(example.labels)]
    texts = [str(token) for token in example.ids]
    if tokenizer is not None:
        texts = _token_texts(example.ids, tokenizer)
    return ShownRow(example.origin, tuple(zip(texts, trained, strict=True)))


def _token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """Return the text of each token; a character of several tokens is in the last one's text."""
    texts = []
    begin = shown = 0  # The first token of the context; the number of tokens whose text is shown.
    for index in range(len(ids)):
        before = tokenizer.decode(ids[begin:shown])
        text = tokenizer.decode(ids[begin : index + 1])
        if text.endswith("\ufffd") and index + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        shown = index + 1
        begin = max(begin, shown - _CONTEXT)
    return texts
