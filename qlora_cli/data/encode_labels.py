"""Encode labelled texts: each becomes one example whose value is the number of its class.

The tokenizer adds its own special tokens, such as [CLS] and [SEP] of an encoder, and marks the
second text of a pair. A tokenizer that puts nothing between two texts, as those of most decoders,
gets them joined by a line break.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qlora_cli.data.contents import LabelledText
from qlora_cli.data.encode import Example, Result, check_tokenizer, checked
from qlora_cli.data.formats import content_of
from qlora_cli.data.row_errors import FieldsError, RowError
from qlora_cli.data.row_store import Row
from qlora_cli.errors import InputError
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.recipe.suggest import nearest_word

_NUM_SHOWN = 8
"""Labels that an error lists."""


@dataclass(frozen=True)
class LabelEncoder:
    """Encodes labelled texts. It can be sent to other processes.

    labels: names of the classes by number; empty for a regression. has_pairs: whether each row has
    two texts; None if that is not known.
    """

    labels: tuple[str, ...] = ()
    has_pairs: bool | None = None

    def __call__(
        self,
        rows: Sequence[Row],
        format: DataFormat,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        only_check: bool = False,
    ) -> list[Result]:
        """Return an example with a value for each row, or the error of the row.

        Arguments as of `encode`. Raises ModelError if the tokenizer cannot encode the rows,
        InputError if they are of another format.
        """
        if format != "classification":
            raise InputError(
                f"the rows are {format} rows, and task: classification needs a text and a label",
                hint="give each row a text and a label, or set task: causal",
            )
        parsed = [self._content(row) for row in rows]
        contents = [content for content in parsed if isinstance(content, LabelledText)]
        if only_check or len(contents) < len(rows):
            return [content if isinstance(content, FieldsError) else None for content in parsed]
        check_tokenizer(tokenizer, format, needs_template=False)
        examples = encoded_texts(contents, [row.origin for row in rows], tokenizer)
        return [
            checked(self._labelled(example, content), vocab_size)
            for example, content in zip(examples, contents, strict=True)
        ]

    def value(self, label: str | int | float) -> float:
        """Return the number of a label's class, or the number to predict. Raises FieldsError."""
        if not self.labels:
            return _number(label)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        name = str(label).strip()
        if name in self.labels:
            return float(self.labels.index(name))
        if name.isdigit() and int(name) < len(self.labels):
            return float(int(name))
        shown = ", ".join(self.labels[:_NUM_SHOWN])
        more = ", ..." if len(self.labels) > _NUM_SHOWN else ""
        hint = nearest_word(name, self.labels)
        raise FieldsError(f"unknown label {name[:60]!r}; the labels are {shown}{more}", hint)

    def _content(self, row: Row) -> LabelledText | FieldsError:
        content = content_of(row, "classification")
        if isinstance(content, FieldsError):
            return content
        assert isinstance(content, LabelledText)
        if self.has_pairs is not None and self.has_pairs != (content.second is not None):
            if self.has_pairs:
                return FieldsError("no field 'text_pair', which other rows have")
            return FieldsError("a field 'text_pair', which other rows do not have")
        try:
            assert content.label is not None
            self.value(content.label)
        except FieldsError as error:
            return error
        return content

    def _labelled(self, example: Example, content: LabelledText) -> Example | RowError:
        assert content.label is not None
        value = self.value(content.label)
        return Example(
            example.ids,
            example.labels,
            example.origin,
            value=value,
            second=example.second,
            content=content,
        )


def encoded_texts(
    contents: Sequence[LabelledText], origins: Sequence[str], tokenizer: Any
) -> list[Example]:
    """Return the tokens of texts and of pairs of texts, without a value.

    tokenizer: a fast tokenizer.
    """
    joins = not separates_texts(tokenizer)
    texts = [c.text if c.second is None or not joins else f"{c.text}\n{c.second}" for c in contents]
    pairs = [None if joins else content.second for content in contents]
    examples = []
    for text, second, origin in zip(texts, pairs, origins, strict=True):
        encoding = tokenizer(text, second, return_token_type_ids=True)
        ids, types = encoding["input_ids"], encoding["token_type_ids"]
        start = types.index(1) if second is not None and 1 in types else 0
        examples.append(Example(ids, [IGNORE_INDEX] * len(ids), origin, second=start))
    return examples


def separates_texts(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts a token between the two texts of a pair."""
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b")]
    together = tokenizer("a", "b")["input_ids"]
    added = tokenizer.num_special_tokens_to_add
    return len(together) > sum(map(len, alone)) and added(pair=True) > added(pair=False)


def _number(label: str | int | float) -> float:
    try:
        value = float(label)
    except ValueError:
        raise FieldsError(f"the label {str(label)[:60]!r} is not a number") from None
    if not isfinite(value):
        raise FieldsError(f"the label {value} is not finite")
    return value
