"""Tokenize with the library fastokens if it is installed and supports the base's tokenizer.

It is several times as fast as the tokenizers library for byte-level BPE, which most bases use. It
reports no character offsets, and none are needed: a token of byte-level BPE is a known sequence of
bytes. A text is left to the base's own tokenizer if its tokens are not exactly its bytes, for
example because a normalizer changed it, or if a trained span begins or ends inside a token.

Some texts are tokenized by both libraries, and must have the same tokens: the first text of each
call, and each text with a character outside of ASCII that no compared text had.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.align import Span
from qlora_cli.errors import QloraError
from qlora_cli.nn.labels import IGNORE_INDEX

_PACKAGE = "fastokens"
_FEW_TEXTS = 2_000
"""Texts that a process encodes in about the time in which a FastTokenizer is created."""
_num_texts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Tokenizer -> number of texts that this process has encoded with it."""
TokensAndLabels = tuple[list[int], list[int]]
_PROBE = "It's 3,141 €:\n\n  don't\tnaïve\r\n 東京 🙂 x=1; "
_SHOWN = 80
"""Characters of a text that an error shows."""


def fast_tokenizer(tokenizer: Any, num_texts: int) -> FastTokenizer | None:
    """Return a FastTokenizer for the base's tokenizer; None if there is none, or texts are few.

    tokenizer: a fast tokenizer of transformers. num_texts: number of texts that are encoded next.
    """
    if not find_spec(_PACKAGE):
        return None
    earlier = _num_texts.get(tokenizer, 0)
    _num_texts[tokenizer] = earlier + num_texts
    return _fast_tokenizer(tokenizer, len(tokenizer)) if earlier >= _FEW_TEXTS else None


def install_hint(tokenizer: Any) -> str | None:
    """Return a line on how to tokenize faster; None if it is not possible or done already."""
    if find_spec(_PACKAGE) or not _is_byte_level(_definition(tokenizer)):
        return None
    return (
        "pip install 'qlora-cli[fast-tokens]' makes the tokenization of many rows faster; the "
        "tokens are the same"
    )


@lru_cache(maxsize=1)
def _fast_tokenizer(tokenizer: Any, size: int) -> FastTokenizer | None:
    """Return a FastTokenizer, or None. size: of the vocabulary, which can grow."""
    definition = _definition(tokenizer)
    if not _is_byte_level(definition):
        return None
    added = "".join(token.content for token in tokenizer.added_tokens_decoder.values())
    try:
        found = FastTokenizer(tokenizer, definition, size)
        agrees = all(map(found.agrees, (_PROBE, f" {added} a", f"a{added}a")))
    except (ValueError, LookupError, NotImplementedError):
        # The library does not support the definition, or its tokens are not all bytes.
        return None
    return found if agrees else None


class FastTokenizer:
    """Encodes texts and their trained spans as the base's tokenizer does.

    tokenizer: of the base. definition: the content of its tokenizer.json. size: of its vocabulary.
    Raises ValueError if the library does not support the definition, LookupError if a token is not
    a sequence of bytes.
    """

    def __init__(self, tokenizer: Any, definition: dict[str, Any], size: int) -> None:
        from fastokens import Tokenizer

        limits = {"truncation": None, "padding": None}
        self._encoder = Tokenizer.from_json_str(json.dumps(definition | limits))
        self._tokenizer = tokenizer
        self._bytes = _token_bytes(tokenizer, size)
        self._lengths = np.array([len(token) for token in self._bytes], np.int64)
        self._before, self._after = self._added_tokens()
        self._compared: set[str] = set()

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], *, add_special_tokens: bool
    ) -> list[TokensAndLabels | None]:
        """Return the token ids and the labels of each text.

        spans: that are trained, in ascending order, for each text. Labels are as of
        `trained_labels`. A text is None if only the base's tokenizer can find its labels.
        Raises QloraError if both libraries tokenize a text and have different tokens.
        """
        try:
            flat, bounds = self._encoder.encode_batch_flat(list(texts))
        except ValueError:  # A byte that has no token.
            return [None] * len(texts)
        cuts = np.frombuffer(bounds, np.uint64)[1:-1].astype(np.int64)
        rows = np.split(np.frombuffer(flat, np.uint32).astype(np.int64), cuts)
        self._compare_some(texts, rows)
        found = [self._labels(*row) for row in zip(texts, rows, spans, strict=True)]
        if not add_special_tokens:
            return found
        before, after = ([IGNORE_INDEX] * len(ids) for ids in (self._before, self._after))
        return [
            row and (self._before + row[0] + self._after, before + row[1] + after) for row in found
        ]

    def agrees(self, text: str) -> bool:
        """Return whether both libraries have the same tokens for a text."""
        flat, _ = self._encoder.encode_batch_flat([text])
        ids: list[int] = np.frombuffer(flat, np.uint32).tolist()
        return ids == self._expected(text)

    def _expected(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _labels(
        self, text: str, ids: NDArray[np.int64], spans: Sequence[Span]
    ) -> TokensAndLabels | None:
        tokens = ids.tolist()
        if b"".join(map(self._bytes.__getitem__, tokens)) != text.encode():
            return None
        labels = [IGNORE_INDEX] * len(tokens)
        ends = np.cumsum(self._lengths[ids])
        for start, stop in _in_bytes(text, spans):
            if start == stop:
                return None
            first, last = np.searchsorted(ends, (start, stop - 1), side="right")
            if ends[first] - self._lengths[ids[first]] != start or ends[last] != stop:
                return None
            labels[first : last + 1] = tokens[first : last + 1]
        return tokens, labels

    def _compare_some(self, texts: Sequence[str], rows: Sequence[NDArray[np.int64]]) -> None:
        for number, (text, ids) in enumerate(zip(texts, rows, strict=True)):
            new = set() if text.isascii() else set(text) - self._compared
            if number and not new:
                continue
            if ids.tolist() != self._expected(text):
                raise QloraError(
                    f"{_PACKAGE} and the base's tokenizer have different tokens for "
                    f"{text[:_SHOWN]!r}",
                    hint=f"uninstall {_PACKAGE}; rows are then tokenized by the base's tokenizer",
                )
            self._compared |= new

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the base's tokenizer adds in front of a text and after it."""
        bare, full = (
            self._tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True)
        )
        start = full.index(bare[0])
        return full[:start], full[start + len(bare) :]


def _definition(tokenizer: Any) -> dict[str, Any]:
    """Return the content of the tokenizer.json."""
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return definition


def _is_byte_level(definition: dict[str, Any]) -> bool:
    """Return whether tokens are sequences of bytes, found by BPE without dropout."""
    model, split = definition["model"], definition["pre_tokenizer"] or {}
    last = split["pretokenizers"][-1] if split.get("type") == "Sequence" else split
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and (definition["decoder"] or {}).get("type") == "ByteLevel"
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
    )


def _token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """Return the bytes of each token. An id without a token has none."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    found = [b""] * max(size, max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        found[number] = (
            token.encode() if number in added else bytes(map(byte_of.__getitem__, token))
        )
    return found


def _in_bytes(text: str, spans: Sequence[Span]) -> Sequence[Span]:
    if text.isascii():
        return spans
    return [(len(text[:start].encode()), len(text[:stop].encode())) for start, stop in spans]
