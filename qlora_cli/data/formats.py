"""The data formats: which fields a row has and what they become.

To add a format, add one entry to `FORMATS` and its name to `DataFormat` in recipe/schema.py. A
format converts a row to one of five contents, which an `encode` function turns into token ids:
a conversation, a prompt with its completion, ready token ids, a pair of answers, or a labelled
text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_cli.data.contents import AnswerPair, Content, PromptCompletion, TokenIds
from qlora_cli.data.conversation import (
    PAIR,
    from_alpaca,
    from_messages,
    from_pair,
    from_sharegpt,
    parsed_json,
)
from qlora_cli.data.labelled import from_labelled
from qlora_cli.data.row_errors import FieldsError, RowError, check_strings, missing_field
from qlora_cli.data.row_store import Row, Rows
from qlora_cli.errors import DataError, Problem
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Taori et al. 2023, `PROMPT_DICT` of stanford_alpaca's train.py, to the letter."""


Fields = dict[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """One data format.

    name: its value of `data.format`. description: one sentence for the documentation.
    required: fields that must be present and not null. optional: other fields that are read.
    convert: function of a row's fields and of whether the tokenizer has a chat template; it checks
    the values, raises RowError, and returns the row's content.
    chat_template: whether rows are written by the tokenizer's chat template; `for messages`: those
    with lists of messages are.
    tokenized: False if rows are token ids already.
    aliases: names that other tools use for a field -> the field's name; used in hints.
    """

    name: DataFormat
    description: str
    required: tuple[str, ...]
    convert: Callable[[Fields, bool], Content]
    optional: tuple[str, ...] = ()
    chat_template: Literal["required", "if present", "for messages", "never"] = "never"
    tokenized: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields_text(self) -> str:
        """Return the fields as the documentation shows them; `?` marks an optional one."""
        return f"{{{', '.join((*self.required, *(f'{name}?' for name in self.optional)))}}}"

    def content(self, fields: Fields, has_chat_template: bool) -> Content:
        """Return the content of a row. Raises RowError if its fields are not of this format.

        has_chat_template: whether the base's tokenizer has a chat template.
        """
        for key in self.required:
            if fields.get(key) is None:
                raise missing_field(key, fields, self.aliases)
        return self.convert(fields, has_chat_template)

    def uses_chat_template(self, tokenizer: Any) -> bool:
        """Return whether `tokenizer` (None if there is none) writes the rows as chats."""
        return self.chat_template != "never" and bool(getattr(tokenizer, "chat_template", None))


def detect_format(rows: Sequence[Row], wanted: Literal["auto"] | DataFormat) -> DataFormat:
    """Return the format of the rows.

    wanted: a format's name, which is returned; or `auto`: the format whose required fields most
    rows have. Only field names are compared.
    Raises DataError if no row has the fields of any format.
    """
    if wanted != "auto":
        return wanted
    votes = rows.votes if isinstance(rows, Rows) else _votes(rows)
    if votes:
        return votes.most_common(1)[0][0]
    known = "; ".join(f"{name}: {', '.join(known.required)}" for name, known in FORMATS.items())
    first = rows[0]
    raise DataError(
        "the rows are in no known format",
        [Problem(first.origin, f"its fields are {', '.join(first.fields) or 'none'}")],
        hint=f"{_columns_hint(first.fields) or 'set data.columns'}, or rename the fields to those "
        f"of one format ({known})",
    )


def _columns_hint(fields: Fields) -> str | None:
    """Return how to set `data.columns` for fields with names that other tools use."""
    if (known := likely_columns(fields)) is None:
        return None
    columns, name = known
    pairs = ", ".join(f"{field}: {column}" for field, column in columns.items())
    return f"set data.columns to {{{pairs}}} to read them as {name} rows"


def likely_columns(fields: Fields) -> tuple[dict[str, str], DataFormat] | None:
    """Return (`data.columns`, format) for fields with names that other tools use, or None."""
    for known in FORMATS.values():
        columns: dict[str, str] = {}
        for name in known.required:
            names = [key for key in fields if known.aliases.get(key) == name]
            columns |= {name: names[0]} if names and name not in fields else {}
        if columns and all(name in columns or name in fields for name in known.required):
            return columns, known.name
    return None


def content_of(
    row: Row, format: DataFormat, *, has_chat_template: bool = False
) -> Content | FieldsError:
    """Return the content of a row, or the error if its fields or values are not of the format.

    has_chat_template: whether the base's tokenizer has a chat template.
    """
    try:
        return FORMATS[format].content(row.fields, has_chat_template)
    except RowError as error:
        return FieldsError(str(error), error.hint)


def _votes(rows: Sequence[Row]) -> Counter[DataFormat]:
    return Counter(name for row in rows if (name := format_of(row.fields)))


def format_of(fields: Fields) -> DataFormat | None:
    """Return the first format whose required fields are present; None if there is none."""
    for name, known in FORMATS.items():
        if all(fields.get(key) is not None for key in known.required):
            return name
    return None


def _text(fields: Fields, has_chat_template: bool) -> PromptCompletion:
    check_strings(fields, "text")
    if not fields["text"]:
        raise RowError("'text' is empty")
    return PromptCompletion("", fields["text"])


def _completion(fields: Fields, has_chat_template: bool) -> PromptCompletion:
    check_strings(fields, "prompt", "completion")
    return PromptCompletion(fields["prompt"], fields["completion"])


def _alpaca(fields: Fields, has_chat_template: bool) -> Content:
    check_strings(fields, "instruction", "output", "input", "system")
    if fields.get("history"):
        raise RowError("'history' is not supported", "write the chat as messages rows")
    if has_chat_template:
        return from_alpaca(fields)
    for key in ("system", "tools"):
        if fields.get(key):
            raise RowError(f"{key!r} needs a chat template, and the base's tokenizer has none")
    layout = ALPACA_WITH_INPUT if fields.get("input") else ALPACA
    return PromptCompletion(layout.format_map(fields), fields["output"])


def _tokens(fields: Fields, has_chat_template: bool) -> TokenIds:
    # A cell of a CSV file contains JSON text.
    ids, labels, mask = (
        parsed_json(fields.get(key), repr(key)) for key in ("input_ids", "labels", "attention_mask")
    )
    _check_ids("input_ids", ids, 0)
    if labels is not None:
        _check_ids("labels", labels, IGNORE_INDEX)
    if not isinstance(mask, list | None):
        raise RowError("'attention_mask' must be a list of integers")
    if labels is not None and len(labels) != len(ids):
        raise RowError(f"{len(labels)} labels for {len(ids)} input_ids")
    if 0 in (mask or ()):
        raise RowError("'attention_mask' hides tokens", "remove padding from the rows")
    return TokenIds(list(ids), list(ids if labels is None else labels))


def _preference(fields: Fields, has_chat_template: bool) -> AnswerPair:
    if isinstance(fields["chosen"], str) and isinstance(fields["rejected"], str):
        check_strings(fields, "prompt")
        if fields.get("prompt") is None:
            raise RowError(
                "no field 'prompt', which the texts in 'chosen' and 'rejected' answer",
                "add the prompt, or write 'chosen' and 'rejected' as lists of messages",
            )
        prompt: str = fields["prompt"]
        return AnswerPair(*(PromptCompletion(prompt, fields[key]) for key in PAIR))
    return AnswerPair(*from_pair(fields))


def _check_ids(name: str, values: Any, lowest: int) -> None:
    """Raise RowError unless `values` is a list of token ids; `lowest` may be IGNORE_INDEX."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise RowError(f"{name!r} must be a list of integers")
    for value in values:
        if lowest < value < 0 or value < lowest:
            raise RowError(f"{value} in {name!r} is not a token id")


_ALL = (
    RowFormat(
        "messages",
        "A chat as a list of messages with `role` and `content`; the assistant's are trained.",
        required=("messages",),
        optional=("tools", "functions"),
        convert=lambda fields, _: from_messages(fields),
        chat_template="required",
    ),
    RowFormat(
        "sharegpt",
        "A chat as a list of turns with `from` and `value`; the assistant's are trained.",
        required=("conversations",),
        optional=("system", "tools"),
        convert=lambda fields, _: from_sharegpt(fields),
        chat_template="required",
    ),
    RowFormat(
        "tokens",
        "Ready token ids; a label of -100 marks a token that is not trained.",
        required=("input_ids",),
        optional=("labels", "attention_mask"),
        convert=_tokens,
        tokenized=False,
    ),
    RowFormat(
        "completion",
        "A prompt, which is not trained, and its completion, which is.",
        required=("prompt", "completion"),
        convert=_completion,
        aliases={
            "question": "prompt",
            "input": "prompt",
            "query": "prompt",
            "answer": "completion",
            "response": "completion",
        },
    ),
    RowFormat(
        "alpaca",
        "An instruction and its output; a chat if the tokenizer has a chat template, else "
        "Stanford Alpaca's prompt.",
        required=("instruction", "output"),
        optional=("input", "system", "tools"),
        convert=_alpaca,
        chat_template="if present",
    ),
    RowFormat(
        "text",
        "Plain text; every token is trained.",
        required=("text",),
        convert=_text,
        aliases={"content": "text"},
    ),
    RowFormat(
        "preference",
        "A chosen and a rejected answer to one prompt, for `task: preference`: texts, or lists of "
        "messages.",
        required=PAIR,
        optional=("prompt", "tools"),
        convert=_preference,
        chat_template="for messages",
    ),
    RowFormat(
        "classification",
        "A text or a pair of texts with its label, for `task: classification`: a name or a number.",
        required=("text", "label"),
        optional=("text_pair",),
        convert=lambda fields, _: from_labelled(fields),
    ),
)

FORMATS: dict[DataFormat, RowFormat] = {known.name: known for known in _ALL}
"""All formats by name, in the order in which `auto` tries them.

`text` is after `alpaca` because published Alpaca rows have their rendered prompt as `text`, too.
`preference` and `classification` are last: such rows often have the fields of another format as
well, and the task sets the format.
"""
