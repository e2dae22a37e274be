"""Checks of each row's own text, while the row is tokenized, and what they found in all rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from qlora_cli.data.chat_checks import LEAST_COPIED, chat_faults
from qlora_cli.data.contents import Content, LabelledText, PromptCompletion
from qlora_cli.data.conversation import Conversation
from qlora_cli.data.encode import Example
from qlora_cli.data.finding_codes import CODES
from qlora_cli.data.findings import NAMED, Finding, finding
from qlora_cli.data.formats import Fields
from qlora_cli.data.row_store import Row
from qlora_cli.recipe.schema import DataFormat

_MARKUP = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "[INST]", "[/INST]", "<<SYS>>"),
    *("<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)
"""Texts that chat templates write and people hardly do."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
_INVISIBLE = re.compile("[\u200b\u2060\u202a-\u202e]")
_CONTINUATION = bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "\x81\x8d\x8f\x90\x9d"
"""The bytes of UTF-8 after the first one, as they look in Windows-1252."""
_MOJIBAKE = re.compile(f"Ã[\u0080-\u00bf{_CONTINUATION}]|Â[\u00a0-\u00bf]|â€|ðŸ|ï¿½")
_HTML = re.compile(
    r"&(?:amp|lt|gt|quot|nbsp|apos|#\d{2,5}|#x[0-9a-fA-F]{2,5});"
    r"|</?(?:p|br|div|span|a|li|ul|ol|strong|em|b|i|h[1-6]|table|tr|td|img)\b[^<>\n]*>"
)
_OPEN_END = re.compile(r"[\w,]\Z")
_WORDS = re.compile(r"[^\W_]+")
_ASCII_WORDS = bytes(code if chr(code).isalnum() and code < 128 else 32 for code in range(256))
"""Translation of ASCII characters that leaves what `_WORDS` finds, and spaces."""
_LEAST_CUT = 40
"""Characters from which on an answer may have been cut."""
_CUT_SHARE = 0.1
_CUT_ROWS = 5
"""Share of all rows, and number of rows, whose answers have one length if they are reported."""


@dataclass
class RowFaults:
    """What the checks of texts found. It can be added up and stored as JSON.

    rows: number of rows. counts: of rows by code. first: origins of the first of them by code.
    cut: number of answers without end punctuation by their length, such as `200 characters`.
    """

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def count(self, origin: str, codes: Sequence[str]) -> None:
        """Add one row and the codes of its faults."""
        self.rows += 1
        for code in codes:
            self._add(code, 1, [origin])

    def add(self, other: RowFaults) -> None:
        """Add what was found in other rows."""
        self.rows += other.rows
        for code, number in other.counts.items():
            self._add(code, number, other.first[code])
        self.cut = dict(Counter(self.cut) + Counter(other.cut))

    def _add(self, code: str, number: int, origins: Sequence[str]) -> None:
        self.counts[code] = self.counts.get(code, 0) + number
        first = self.first.setdefault(code, [])
        first += [*origins][: NAMED - len(first)]

    def findings(self) -> Iterator[Finding]:
        """Yield one finding per code that occurs in enough rows."""
        for code, number in self.counts.items():
            if number >= CODES[code].share * self.rows:
                yield finding(code, number, self.first[code])
        for length, number in sorted(self.cut.items(), key=lambda item: -item[1])[:1]:
            if number >= max(_CUT_ROWS, _CUT_SHARE * self.rows):
                yield finding("cut-answers", detail=f"{number} of {self.rows} have {length}")


class RowChecker:
    """Finds faults in the fields of rows. tokenizer: the base's; None if it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = str(getattr(tokenizer, "chat_template", None) or "")
        self._special = _special_tokens(tokenizer)
        self._own = re.compile("|".join(map(re.escape, sorted(self._special, key=len)[::-1])))
        self._starts = {token[0] for token in self._special}

    def check(
        self, rows: Sequence[Row], row_format: DataFormat, examples: Sequence[Example]
    ) -> tuple[RowFaults, list[int]]:
        """Return the faults of rows, and the digest of each row's words.

        examples: of the rows, in the same order. A digest is 0 if the row has no text; it is the
        same for rows that differ only in case, white space and punctuation.
        """
        faults = RowFaults()
        digests = []
        for row, example in zip(rows, examples, strict=True):
            texts = _texts(example.content)
            codes = {*self._faults(example.content, row.fields, row_format), *_text_faults(texts)}
            if example.begins_inside_token:
                codes.add("inside-token")
            faults.count(row.origin, [code for code in CODES if code in codes] if codes else ())
            if row_format not in ("text", "classification") and texts:
                _count_cut(faults.cut, texts[-1], example)
            digests.append(_digest(texts))
        return faults, digests

    def _faults(
        self, content: Content | None, fields: Fields, row_format: DataFormat
    ) -> Iterator[str]:
        if isinstance(content, Conversation):
            yield from chat_faults(content, self._template)
            for message in content.messages:
                yield from self._markup(message.get("content", ""), is_chat=True)
        if isinstance(content, PromptCompletion):
            yield from self._markup(content.prompt, is_chat=False)
            yield from self._markup(content.completion, is_chat=False)
            yield from _pair_faults(content, fields, row_format)
            if row_format != "text" and self._ends_inside(content.completion):
                yield "special-token"

    def _markup(self, text: str, *, is_chat: bool) -> Iterator[str]:
        """Yield the faults of special tokens and chat markup in a text.

        is_chat: whether the template writes the text. Other rows may be rendered by their author,
        with the special tokens of this tokenizer.
        """
        if is_chat and any(start in text for start in self._starts) and self._own.search(text):
            yield "special-token"
        if self._tokenizer is None or not ("<" in text or "[" in text):
            return
        for token in _MARKUP:
            is_own = token in self._special or (not is_chat and token in self._template)
            if token in text and not is_own:
                yield "foreign-markup"

    def _ends_inside(self, completion: str) -> bool:
        eos = str(getattr(self._tokenizer, "eos_token", None) or "")
        return bool(eos) and eos in completion.rstrip().removesuffix(eos)


def _special_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens that are no text; `<unk>` is found as an unknown token."""
    if tokenizer is None:
        return set()
    added = tokenizer.added_tokens_decoder.values()
    tokens = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return {token for token in tokens if len(token) > 2} - {tokenizer.unk_token}


def _texts(content: Content | None) -> list[str]:
    """Return the texts of a row, the last answer last; empty for rows of ids."""
    if isinstance(content, Conversation):
        return [message.get("content", "") for message in content.messages]
    if isinstance(content, PromptCompletion):
        return [content.prompt, content.completion]
    if isinstance(content, LabelledText):
        return [content.text, *([content.second] if content.second else [])]
    return []


def _pair_faults(
    content: PromptCompletion, fields: Fields, row_format: DataFormat
) -> Iterator[str]:
    """Yield the faults of a prompt, its completion and the place between them."""
    prompt, completion = content.prompt, content.completion
    if not completion.strip():
        yield "empty-answer"
    if row_format == "text":
        return
    if not fields.get("instruction" if row_format == "alpaca" else "prompt", "").strip():
        yield "empty-prompt"
    if completion.strip() and completion != completion.rstrip():
        yield "answer-space"
    copied = completion.strip()
    if len(copied) >= LEAST_COPIED and copied in prompt:
        yield "answer-in-prompt"
    if row_format != "completion" or not prompt or not completion:
        return
    last, first = prompt[-1], completion[0]
    if last in " \t" and prompt.strip() and not first.isspace():
        yield "prompt-space"
    if (_is_word(last) or last in ".?!,;") and _is_word(first):
        yield "joined-words"


def _is_word(character: str) -> bool:
    """Return whether a character is of a script that separates words by spaces."""
    return character.isalnum() and ord(character) < 0x0E00


def _text_faults(texts: Sequence[str]) -> Iterator[str]:
    """Yield the faults of characters and encodings."""
    text = "\n".join(texts)
    if _CONTROL.search(text):
        yield "control-characters"
    if not text.isascii():
        if "\ufffd" in text:
            yield "replacement-character"
        if "\ufeff" in text:
            yield "byte-order-mark"
        if _INVISIBLE.search(text):
            yield "invisible-characters"
        if _MOJIBAKE.search(text):
            yield "mojibake"
    # A text about HTML or with program code contains these on purpose.
    is_code = "```" in text or "html" in text.lower()
    if ("&" in text or "<" in text) and not is_code and _HTML.search(text):
        yield "html"
    if "\\n" in text and not is_code and any(_has_literal_newlines(one) for one in texts):
        yield "literal-newlines"


def _has_literal_newlines(text: str) -> bool:
    r"""Return whether `\n` is written in place of line breaks, and not inside a quoted string."""
    if "\n" in text or "\\n" not in text:
        return False
    return bool(re.search(r"\\n(?:\\n|[^a-z]|\Z)", text)) and not re.search(
        r"[\"'(]\\n|\\n[\"')]", text
    )


def _count_cut(cut: dict[str, int], answer: str, example: Example) -> None:
    """Count the lengths of an answer that ends without punctuation."""
    if len(answer) >= _LEAST_CUT and _OPEN_END.search(answer):
        for length in (f"{len(answer)} characters", f"{example.num_targets} tokens"):
            cut[length] = cut.get(length, 0) + 1


def _digest(texts: Sequence[str]) -> int:
    text = "\n".join(texts).lower()
    if text.isascii():
        words = b" ".join(text.encode().translate(_ASCII_WORDS).split())
    else:
        words = " ".join(_WORDS.findall(text)).encode(errors="replace")
    return int.from_bytes(blake2b(words, digest_size=8).digest()) if words else 0
