"""Encode rows of every format as token ids and labels.

A row becomes one text and the spans of characters in it that are trained. The text is tokenized in
one piece, so that tokens at the boundary of prompt and completion are those that the model reads
later. A token is trained if any of its characters is in a trained span. A token that crosses the
boundary is therefore trained: otherwise the model could not learn its characters.

Special tokens occur once. A chat template writes its own, so nothing is added to a chat. Other rows
get the tokens that the tokenizer adds at the beginning, and one end token, which is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.align import Span
from qlora_cli.data.chat_template import ChatTemplate
from qlora_cli.data.conversation import Conversation
from qlora_cli.data.formats import FORMATS, Content, RowFormat, TokenIds, parse_rows
from qlora_cli.data.row_errors import RowError, rows_error
from qlora_cli.data.rows import Row
from qlora_cli.data.tool_calls import ToolsNotWritten
from qlora_cli.errors import DataError, ModelError, Problem
from qlora_cli.nn.loss import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.units import format_count

_NAMED = 3
"""Rows that an error about tools names."""
_CHUNK = 1000
"""Rows tokenized in one call; the offsets of more rows would take gigabytes."""


@dataclass(frozen=True)
class Example:
    """A row as token ids.

    ids: token ids of the complete row. labels: of the same length and not shifted: the token's own
    id if it is trained, else IGNORE_INDEX. origin: file and line, for example `rows.jsonl:42`.
    """

    ids: list[int]
    labels: list[int]
    origin: str

    @property
    def num_targets(self) -> int:
        """Return the number of trained tokens; the first token is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class _Text:
    """A row's text and its trained spans.

    add_begin: whether the tokenizer adds its first tokens. add_end: whether an end token is added.
    """

    text: str
    spans: tuple[Span, ...]
    add_begin: bool
    add_end: bool


def encode(
    rows: list[Row],
    format: DataFormat,
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Example]:
    """Return one Example per row, in order, of any length.

    tokenizer: a fast tokenizer; may be None if the format is `tokens`. vocab_size: size of the
    model's vocabulary; None skips this check. on_progress: called with the number of rows that are
    tokenized so far.
    Raises DataError listing every row that is malformed, outside the vocabulary or without a
    trained token; ModelError if the tokenizer cannot encode this format.
    """
    row_format = FORMATS[format]
    has_chat_template = bool(getattr(tokenizer, "chat_template", None))
    contents = parse_rows(rows, format, has_chat_template=has_chat_template)
    if row_format.tokenized:
        _check_tokenizer(tokenizer, row_format)
        results = _from_texts(rows, contents, tokenizer, on_progress)
    else:
        vocab_size = vocab_size or (tokenizer and len(tokenizer))
        results = _from_ids(rows, contents)
    return _checked(rows, results, vocab_size)


def _checked(
    rows: list[Row],
    results: Iterator[Example | RowError],
    vocab_size: int | None,
) -> list[Example]:
    examples: list[Example] = []
    problems: list[Problem] = []
    without_tools: list[Problem] = []
    for row, result in zip(rows, results, strict=True):
        try:
            if isinstance(result, RowError):
                raise result
            _check_example(result, vocab_size)
            examples.append(result)
        except ToolsNotWritten as error:
            without_tools.append(error.problem(row.origin))
        except RowError as error:
            problems.append(error.problem(row.origin))
    if without_tools:
        raise _tools_error(without_tools, len(rows))
    if problems:
        raise rows_error(problems, len(rows))
    return examples


def _tools_error(problems: list[Problem], num_rows: int) -> DataError:
    """Return the one error about rows with tools that the chat template does not write."""
    number = f"{format_count(len(problems))} of {format_count(num_rows)}"
    return DataError(
        f"the chat template does not write tool calls, which {number} rows contain; the first:",
        problems[:_NAMED],
        hint="use a base whose chat template supports tools, name one with data.template, or "
        "remove the tools and their messages from the rows",
    )


def _check_example(example: Example, vocab_size: int | None) -> None:
    if vocab_size is not None:
        largest = max(max(values, default=0) for values in (example.ids, example.labels))
        if largest >= vocab_size:
            raise RowError(f"token id {largest}, but the vocabulary ends at {vocab_size - 1}")
    if not example.num_targets:
        raise RowError("no token of this row would be trained")


def _check_tokenizer(tokenizer: Any, row_format: RowFormat) -> None:
    if tokenizer is None:
        raise ModelError(
            "the base has no tokenizer", hint="only rows of input_ids (format: tokens) can be used"
        )
    if not tokenizer.is_fast:
        raise ModelError(
            "the base's tokenizer is a slow one, which reports no character offsets of its tokens",
            hint="a tokenizer.json is needed; transformers writes one with save_pretrained",
        )
    if row_format.chat_template == "required" and not tokenizer.chat_template:
        raise ModelError(
            f"{row_format.name} rows need a chat template, and the base's tokenizer has none",
            hint="use the instruct variant of the base, set data.template (chatml, alpaca or a "
            "Jinja file), or write prompt and completion rows",
        )


def _from_ids(rows: list[Row], contents: list[Content]) -> Iterator[Example | RowError]:
    for row, content in zip(rows, contents, strict=True):
        assert isinstance(content, TokenIds)
        yield Example(content.ids, content.labels, row.origin)


def _from_texts(
    rows: list[Row],
    contents: list[Content],
    tokenizer: Any,
    on_progress: Callable[[int], None] | None,
) -> Iterator[Example | RowError]:
    template = ChatTemplate(tokenizer)
    for first in range(0, len(rows), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        texts = [_text(content, template) for content in contents[chunk]]
        yield from _tokenized(rows[chunk], texts, tokenizer)
        if on_progress is not None:
            on_progress(min(chunk.stop, len(rows)))


def _text(content: Content, template: ChatTemplate) -> _Text | RowError:
    if isinstance(content, Conversation):
        try:
            rendered = template.render(content)
        except RowError as error:
            return error
        return _Text(rendered.text, rendered.spans, add_begin=False, add_end=False)
    assert not isinstance(content, TokenIds)
    text, bos = content.prompt + content.completion, template.tokenizer.bos_token
    # A prompt copied from a rendered chat already begins with the BOS token.
    has_bos = bool(bos) and text.startswith(bos)
    span = (len(content.prompt), len(text))
    return _Text(text, (span,), add_begin=not has_bos, add_end=True)


def _tokenized(
    rows: list[Row], texts: Sequence[_Text | RowError], tokenizer: Any
) -> Iterator[Example | RowError]:
    """Yield the example of each text, and each error as it is, in order."""
    examples: dict[int, Example] = {}
    for add_begin in (True, False):
        batch = [
            (index, text)
            for index, text in enumerate(texts)
            if isinstance(text, _Text) and text.add_begin == add_begin
        ]
        if not batch:
            continue
        # verbose=False: the limit is seq_len, not the tokenizer's own maximum.
        tokens = tokenizer(
            [text.text for _, text in batch],
            add_special_tokens=add_begin,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for i, (index, text) in enumerate(batch):
            ids, offsets = tokens["input_ids"][i], tokens["offset_mapping"][i]
            labels = _labels(ids, offsets, text.spans)
            if text.add_end:
                _add_end(ids, labels, tokenizer.eos_token_id)
            examples[index] = Example(ids, labels, rows[index].origin)
    for index, item in enumerate(texts):
        yield item if isinstance(item, RowError) else examples[index]


def _labels(ids: list[int], offsets: list[Span], spans: tuple[Span, ...]) -> list[int]:
    """Return the id of each token that has a character in a span, else IGNORE_INDEX.

    offsets: [start, stop) of each token in characters. spans: in ascending order.
    """
    labels = [IGNORE_INDEX] * len(ids)
    first = 0
    for start, stop in spans:
        while first < len(ids) and offsets[first][1] <= start:
            first += 1
        for i in range(first, len(ids)):
            token_start, token_stop = offsets[i]
            # A tokenizer that removes white space from its offsets gives an empty range for a
            # token of white space; its character is the one before `token_stop`.
            if min(token_start, token_stop - 1) >= stop:
                break
            if token_stop > start:
                labels[i] = ids[i]
    return labels


def _add_end(ids: list[int], labels: list[int], eos: int | None) -> None:
    """Make the row end with one trained end token, which may be there already."""
    if eos is None:
        return
    if not ids or ids[-1] != eos:
        ids.append(eos)
        labels.append(eos)
    labels[-1] = eos
