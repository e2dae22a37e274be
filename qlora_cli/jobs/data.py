"""`qlora data`: what the model will see of the rows, before anything is trained."""

from __future__ import annotations

from typing import Any

from qlora_cli.data.checks import EncodedDataset, examine
from qlora_cli.data.encode import Example, encode
from qlora_cli.data.formats import detect_format, read_rows
from qlora_cli.data.packing import pack
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.files.locate import find_config, read_config
from qlora_cli.jobs.results import DataResult, ShownRow
from qlora_cli.nn.loss import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat, Recipe

_CONTEXT = 8
"""Tokens decoded in front of one, so that its text comes out with its spaces."""


def run(recipe: Recipe, *, show: int) -> DataResult:
    """Encode the recipe's rows and look at them; `show` rows come back token by token.

    Of the base it loads the tokenizer, and the config where rows are ids. Raises InputError,
    DataError or ModelError where training would.
    """
    data = recipe.data
    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    found, examples = _encoded(data.train, recipe, tokenizer)
    held_out = _encoded(data.eval, recipe, tokenizer)[1] if data.eval else []
    lengths = [len(example.ids) for example in examples]
    num_sequences = len(pack(lengths, data.seq_len)) if data.packing else len(lengths)
    patient = EncodedDataset(
        examples, held_out, found, tokenizer, data.seq_len, data.packing, num_sequences
    )
    return DataResult(
        rows=len(examples),
        sequences=num_sequences,
        tokens=sum(lengths),
        trained_tokens=sum(example.num_targets for example in examples),
        longest_row=max(lengths),
        format=found,
        shown=tuple(_shown(example, tokenizer) for example in examples[:show]),
        findings=examine(patient),
    )


def _encoded(where: str, recipe: Recipe, tokenizer: Any) -> tuple[DataFormat, list[Example]]:
    rows = read_rows(where)
    found = detect_format(rows, recipe.data.format)
    vocab_size = None
    if found == "tokens":  # no tokenizer has vouched for these ids
        vocab_size = read_config(find_config(recipe.model.name, recipe.model.revision)).vocab_size
    return found, encode(rows, found, tokenizer, recipe.data.seq_len, vocab_size=vocab_size)


def _shown(example: Example, tokenizer: Any) -> ShownRow:
    """The first token is never predicted, so it is never trained."""
    trained = [i > 0 and label != IGNORE_INDEX for i, label in enumerate(example.labels)]
    texts = [str(token) for token in example.ids]
    if tokenizer is not None:
        texts = _token_texts(example.ids, tokenizer)
    return ShownRow(example.origin, tuple(zip(texts, trained, strict=True)))


def _token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """Each token's part of the text; a character of several tokens stands at its last one."""
    texts = []
    begin = 0
    for place in range(len(ids)):
        before = tokenizer.decode(ids[begin:place])
        text = tokenizer.decode(ids[begin : place + 1])
        if text.endswith("\ufffd") and place + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before.rstrip("\ufffd")) :])
        begin = max(begin, place + 1 - _CONTEXT)
    return texts
