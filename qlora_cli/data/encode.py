"""Encode rows of every format as token ids and labels.

A row becomes one text and the spans of characters in it that are trained. The text is tokenized in
one piece, so that tokens at the boundary of prompt and completion are those that the model reads
later. A token is trained if any of its characters is in a trained span. A token that crosses the
boundary is therefore trained: otherwise the model could not learn its characters.

Special tokens occur once. A chat template writes its own, so nothing is added to a chat. Other rows
get the tokens that the tokenizer adds at the beginning, and one end token, which is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from qlora_cli.data.align import Span
from qlora_cli.data.chat_template import ChatTemplate
from qlora_cli.data.contents import Content, PromptCompletion, TokenIds
from qlora_cli.data.conversation import Conversation
from qlora_cli.data.fast_tokens import FastTokenizer, fast_tokenizer
from qlora_cli.data.formats import FORMATS, content_of
from qlora_cli.data.row_errors import FieldsError, RowError
from qlora_cli.data.row_store import Row
from qlora_cli.data.trained_tokens import begins_inside_token, trained_labels
from qlora_cli.errors import InputError, ModelError
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import DataFormat


@dataclass(frozen=True)
class Example:
    """A row as token ids.

    ids: token ids of the complete row. labels: of the same length and not shifted: the token's own
    id if it is trained, else IGNORE_INDEX. origin: file and line, for example `rows.jsonl:42`.
    segments: lengths of the parts of the row that do not attend to each other, such as the two
    answers of a preference pair; empty if the row is one part. constants: values that a task has
    computed for the row before training, such as log-probabilities under a reference model.
    value: what the complete row is labelled with, in a task that does not train tokens: the number
    of a class, or the number to predict. second: the first token of the second text of a pair; 0 if
    there is none. begins_inside_token: whether the completion begins inside a token, which is
    trained. content: what the row was converted to, for the checks of texts; None if it is not
    known.
    """

    ids: list[int]
    labels: list[int]
    origin: str
    segments: tuple[int, ...] = ()
    constants: tuple[float, ...] = ()
    value: float | None = None
    second: int = 0
    begins_inside_token: bool = field(default=False, compare=False)
    content: Content | None = field(default=None, compare=False, repr=False)

    @property
    def num_targets(self) -> int:
        """Return the number of trained tokens; the first token of a segment is never predicted.

        A row with a value is one target.
        """
        if self.value is not None:
            return 1
        starts = [0, *accumulate(self.segments[:-1])]
        never = sum(self.labels[start : start + 1] != [IGNORE_INDEX] for start in starts)
        return max(len(self.labels) - self.labels.count(IGNORE_INDEX) - never, 0)

    def split(self) -> list[Example]:
        """Return each segment as an example of its own."""
        if not self.segments:
            return [self]
        bounds = [0, *accumulate(self.segments)]
        return [
            Example(self.ids[start:stop], self.labels[start:stop], self.origin)
            for start, stop in pairwise(bounds)
        ]


Result = Example | RowError | None
"""What becomes of a row. None: it was not tokenized, because fields of other rows are faulty."""


@dataclass(frozen=True)
class RenderedText:
    """A row's text and its trained spans.

    add_begin: whether the tokenizer adds its first tokens. add_end: whether an end token is added.
    """

    text: str
    spans: tuple[Span, ...]
    add_begin: bool
    add_end: bool


def encode(
    rows: Sequence[Row],
    format: DataFormat,
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    only_check: bool = False,
) -> list[Result]:
    """Return an Example of any length for each row, in order, or the error of the row.

    tokenizer: a fast tokenizer; may be None if the format is `tokens`. vocab_size: size of the
    model's vocabulary; None skips this check. only_check: check the fields and tokenize nothing.
    Rows are not tokenized either if the fields of one of them are faulty. A row is malformed
    (FieldsError), outside the vocabulary, without a trained token, or has tools that the chat
    template does not write (ToolsNotWritten).
    Raises ModelError if the tokenizer cannot encode this format, InputError if it is `preference`
    or `classification`.
    """
    row_format = FORMATS[format]
    if format == "classification":
        raise InputError(
            "the rows are texts with a label",
            hint="set task: classification, or data.format: text to train on the texts alone",
        )
    if format == "preference":
        raise InputError(
            "the rows are pairs of a chosen and a rejected answer",
            hint="set task: preference, or data.columns to train on one of the answers, such as "
            "{completion: chosen}",
        )
    has_chat_template = bool(getattr(tokenizer, "chat_template", None))
    parsed = [content_of(row, format, has_chat_template=has_chat_template) for row in rows]
    contents = [content for content in parsed if not isinstance(content, FieldsError)]
    if only_check or len(contents) < len(rows):
        return [content if isinstance(content, FieldsError) else None for content in parsed]
    if not row_format.tokenized:
        vocab_size = vocab_size or (tokenizer and len(tokenizer))
        results = _from_ids(rows, contents)
    else:
        uses_template = row_format.chat_template == "required"
        check_tokenizer(tokenizer, row_format.name, needs_template=uses_template)
        template = ChatTemplate(tokenizer)
        texts = [rendered(content, template) for content in contents]
        results = tokenized([row.origin for row in rows], texts, tokenizer, contents)
    return [checked(result, vocab_size) for result in results]


def checked(result: Example | RowError, vocab_size: int | None) -> Example | RowError:
    """Return a result, or the error of an example that cannot be trained on.

    vocab_size: token ids must be smaller than it; None skips this check.
    """
    if isinstance(result, Example):
        try:
            _check_example(result, vocab_size)
        except RowError as error:
            return error
    return result


def _check_example(example: Example, vocab_size: int | None) -> None:
    if vocab_size is not None:
        largest = max(max(values, default=0) for values in (example.ids, example.labels))
        if largest >= vocab_size:
            raise RowError(f"token id {largest}, but the vocabulary ends at {vocab_size - 1}")
    segments = example.split() if example.segments else [example]
    if not all(segment.num_targets for segment in segments):
        raise RowError("no token of this row would be trained")


def check_tokenizer(tokenizer: Any, format: DataFormat, *, needs_template: bool) -> None:
    """Raise ModelError if the tokenizer cannot encode rows of a format.

    needs_template: whether rows are written by its chat template.
    """
    if tokenizer is None:
        raise ModelError(
            "the base has no tokenizer", hint="only rows of input_ids (format: tokens) can be used"
        )
    if not tokenizer.is_fast:
        raise ModelError(
            "the base's tokenizer is a slow one, which reports no character offsets of its tokens",
            hint="a tokenizer.json is needed; transformers writes one with save_pretrained",
        )
    if needs_template and not tokenizer.chat_template:
        raise ModelError(
            f"{format} rows need a chat template, and the base's tokenizer has none",
            hint="use the instruct variant of the base, set data.template (chatml, alpaca or a "
            "Jinja file), or write prompt and completion rows",
        )


def _from_ids(rows: Sequence[Row], contents: Sequence[Content]) -> list[Example | RowError]:
    examples: list[Example | RowError] = []
    for row, content in zip(rows, contents, strict=True):
        assert isinstance(content, TokenIds)
        examples.append(Example(content.ids, content.labels, row.origin))
    return examples


def rendered(content: Content, template: ChatTemplate) -> RenderedText | RowError:
    """Return the text of a chat or of a prompt with its completion, or the row's error."""
    if isinstance(content, Conversation):
        try:
            chat = template.render(content)
        except RowError as error:
            return error
        return RenderedText(chat.text, chat.spans, add_begin=False, add_end=False)
    assert isinstance(content, PromptCompletion)
    text, bos = content.prompt + content.completion, template.tokenizer.bos_token
    # A prompt copied from a rendered chat already begins with the BOS token.
    has_bos = bool(bos) and text.startswith(bos)
    span = (len(content.prompt), len(text))
    return RenderedText(text, (span,), add_begin=not has_bos, add_end=True)


def tokenized(
    origins: Sequence[str],
    texts: Sequence[RenderedText | RowError],
    tokenizer: Any,
    contents: Sequence[Content] | None = None,
) -> list[Example | RowError]:
    """Return the example of each text, and each error as it is, in order.

    origins, contents: of the texts.
    """
    results: list[Any] = list(texts)
    fast = fast_tokenizer(tokenizer, len(texts))
    for add_begin in (True, False):
        batch = [
            (index, text)
            for index, text in enumerate(texts)
            if isinstance(text, RenderedText) and text.add_begin == add_begin
        ]
        found = _encode_fast(fast, batch, add_begin) if fast and batch else {}
        found |= _encode(tokenizer, [item for item in batch if item[0] not in found], add_begin)
        for index, text in batch:
            ids, labels, is_inside = found[index]
            if text.add_end:
                _add_end(ids, labels, tokenizer.eos_token_id)
            content = contents[index] if contents is not None else None
            results[index] = Example(
                ids, labels, origins[index], begins_inside_token=is_inside, content=content
            )
    return results


_Batch = Sequence[tuple[int, RenderedText]]
_Found = dict[int, tuple[list[int], list[int], bool]]
"""Token ids, labels, and whether the first trained token begins inside a token, by index."""


def _encode_fast(fast: FastTokenizer, batch: _Batch, add_begin: bool) -> _Found:
    """Return the tokens of the texts whose trained spans begin and end between tokens."""
    found = fast.encode(
        [text.text for _, text in batch],
        [text.spans for _, text in batch],
        add_special_tokens=add_begin,
    )
    return {
        index: (*row, False)
        for (index, _), row in zip(batch, found, strict=True)
        if row is not None
    }


def _encode(tokenizer: Any, batch: _Batch, add_begin: bool) -> _Found:
    """Return the tokens of all texts of a batch."""
    if not batch:
        return {}
    # verbose=False: the limit is seq_len, not the tokenizer's own maximum.
    tokens = tokenizer(
        [text.text for _, text in batch],
        add_special_tokens=add_begin,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    found: _Found = {}
    for (index, text), ids, encoding in zip(
        batch, tokens["input_ids"], tokens.encodings, strict=True
    ):
        labels = trained_labels(encoding, ids, text.spans, len(text.text))
        # A chat template decides about the characters in front of a turn itself.
        is_inside = text.add_end and begins_inside_token(encoding, labels, text.spans[0][0])
        found[index] = (ids, labels, is_inside)
    return found


def _add_end(ids: list[int], labels: list[int], eos: int | None) -> None:
    """Make the row end with one trained end token, which may be there already."""
    if eos is None:
        return
    if not ids or ids[-1] != eos:
        ids.append(eos)
        labels.append(eos)
    labels[-1] = eos
